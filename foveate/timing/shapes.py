"""Models by name: those in the box, and full-size shapes with random weights, which are right for
time alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Dinov2WithRegistersConfig,
    LlamaConfig,
    LlavaOnevisionConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from policies.models import in_the_box, load
from policies.vla.openvla import load_network
from stream.errors import ConfigError
from stream.registry import suggest

from .flow import ExpertShape, FlowSubject
from .subjects import ActionSubject, Subject, VideoSubject
from .vla import VLASubject

Size = dict[str, Any]
SIGLIP_SO400M: Size = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "vision_use_head": False,
}
DINOV2_LARGE: Size = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
}
LLAMA_7B: Size = {
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
QWEN2_7B: Size = {
    "vocab_size": 152128,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
}
SMOLVLM2_500M: Size = {
    "vocab_size": 49280,
    "hidden_size": 960,
    "intermediate_size": 2560,
    "num_hidden_layers": 16,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
    "head_dim": 64,
}
"""The half of its layers that SmolVLA has."""
SIGLIP_BASE: Size = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 16,
    "vision_use_head": False,
}
GEMMA_2B: Size = {
    "vocab_size": 257152,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
}
TINY: Size = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}


def video_subject(
    name: str, frames: int, decode: int, device: str, dtype: torch.dtype
) -> VideoSubject:
    """A video LLM: a shape by name with random weights, a model in the box, a folder, a hub name.

    Raises AttachError for what cannot be loaded.
    """
    model, weights = random_video(name, device, dtype), "random"
    if model is None:
        model, weights = load(name, device, dtype)[0], "real"
    return VideoSubject(name, weights, model, frames, decode)


def random_video(name: str, device: str, dtype: torch.dtype) -> Any:
    """A video LLM of a shape with random weights; None if no shape has this name."""
    if name not in _VIDEO:
        return None
    return _random(AutoModelForImageTextToText, _VIDEO[name](), device, dtype)


def action_subject(name: str, cameras: int, device: str, dtype: torch.dtype) -> ActionSubject:
    """A robot policy with random weights. Raises UnknownNameError for a name without a shape."""
    if name not in _ACTION:
        raise suggest("policy shape", name, _ACTION)
    tiny, chunk = _ACTION[name]
    dino = {**DINOV2_LARGE, **TINY, "image_size": 56} if tiny else DINOV2_LARGE
    siglip = {**SIGLIP_SO400M, "image_size": 224} | ({**TINY, "image_size": 56} if tiny else {})
    llama = {**LLAMA_7B, **TINY, "vocab_size": 300} if tiny else LLAMA_7B
    towers = [
        _random(AutoModel, Dinov2WithRegistersConfig(**dino), device, dtype),
        _random(AutoModel, SiglipVisionConfig(**siglip), device, dtype),
    ]
    llm = _random(AutoModelForCausalLM, LlamaConfig(**llama), device, dtype)
    width = dino["hidden_size"] + siglip["hidden_size"]
    out = llama["hidden_size"]
    with torch.device(device):
        projector = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, out),
            nn.GELU(),
            nn.Linear(out, out),
        ).to(dtype)
    return ActionSubject(name, towers, projector, llm, cameras, 34, 7, chunk)


def flow_subject(name: str, cameras: int, device: str, dtype: torch.dtype) -> FlowSubject:
    """A flow policy with random weights. Raises UnknownNameError for a name without a shape."""
    if name not in _FLOW:
        raise suggest("policy shape", name, _FLOW)
    shape = _FLOW[name]
    tower = _random(AutoModel, SiglipVisionConfig(**shape.vision), device, dtype)
    prefix = _random(AutoModel, LlamaConfig(**shape.prefix), device, dtype)
    return FlowSubject(name, tower, shape.shuffle, prefix, shape.text, shape.expert, cameras)


def vla_subject(name: str, cameras: int | None, device: str, dtype: torch.dtype) -> VLASubject:
    """A robot policy in the box. Raises ConfigError for another number of cameras than its own."""
    one = VLASubject(name, *load_network(str(in_the_box("robot")[name]), device, dtype))
    if cameras not in (None, one.grid.frames):
        raise ConfigError(f"cameras is {cameras}; {name} has {one.grid.frames}, leave it out.")
    return one


def subject(
    name: str, frames: int, decode: int, cameras: int | None, device: str, dtype: torch.dtype
) -> Subject:
    """Any of them by name; raises as `acts` does.

    cameras: of a robot policy; None = its own ones, or one of a shape.
    """
    if not acts(name):
        return video_subject(name, frames, decode, device, dtype)
    if name in _ACTION:
        return action_subject(name, cameras or 1, device, dtype)
    if name in _FLOW:
        return flow_subject(name, cameras or 1, device, dtype)
    return vla_subject(name, cameras, device, dtype)


def acts(name: str) -> bool:
    """Whether a name is that of a robot policy, not of a video LLM. Raises UnknownNameError, with
    the known names, if it is of neither."""
    if name in (*_ACTION, *_FLOW, *in_the_box("robot")):
        return True
    if name in _VIDEO or name in in_the_box() or "/" in name:
        return False
    raise suggest("model", name, names())


def names() -> tuple[str, ...]:
    """Every name that needs no download."""
    return (*_VIDEO, *_ACTION, *_FLOW, *in_the_box(), *in_the_box("robot"))


def dtype_of(name: str) -> torch.dtype:
    """A floating-point type by its name in torch."""
    kind = getattr(torch, name, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ConfigError(f"'{name}' is no floating-point type; give float32 or bfloat16.")
    return kind


def _random(family: Any, config: PreTrainedConfig, device: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        model = family.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.to(device).eval().requires_grad_(False)


def _llava_onevision(vision: Size, text: Size, image_size: int) -> PreTrainedConfig:
    whole: Size = {
        "vision_config": SiglipVisionConfig(**vision | {"image_size": image_size}),
        "text_config": Qwen2Config(**text),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "image_token_index": text["vocab_size"] - 2,
        "video_token_index": text["vocab_size"] - 1,
    }
    return LlavaOnevisionConfig(**whole)


def _llava_onevision_7b() -> PreTrainedConfig:
    vision = {**SIGLIP_SO400M, "num_hidden_layers": 26}
    return _llava_onevision(vision, QWEN2_7B, 384)


def _tiny_llava() -> PreTrainedConfig:
    text = {**TINY, "vocab_size": 300, "num_key_value_heads": 2}
    return _llava_onevision({**SIGLIP_SO400M, **TINY, "patch_size": 8}, text, 56)


def _qwen2_5_vl(vision: Size, text: Size, sections: list[int]) -> PreTrainedConfig:
    rope = {"rope_type": "default", "mrope_section": sections, "rope_theta": 1000000.0}
    whole: Size = {
        "vision_config": {**vision, "out_hidden_size": text["hidden_size"]},
        "text_config": {**text, "rope_parameters": rope},
    }
    return Qwen2_5_VLConfig(**whole)


def _qwen2_5_vl_7b() -> PreTrainedConfig:
    return _qwen2_5_vl({"depth": 32, "hidden_size": 1280, "num_heads": 16}, QWEN2_7B, [16, 24, 24])


def _tiny_qwen2_5_vl() -> PreTrainedConfig:
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
    text = {**TINY, "vocab_size": 152000, "num_key_value_heads": 2}
    return _qwen2_5_vl(vision | {"fullatt_block_indexes": [1]}, text, [2, 3, 3])


_VIDEO: dict[str, Callable[[], PreTrainedConfig]] = {
    "llava-onevision-7b": _llava_onevision_7b,
    "qwen2.5-vl-7b": _qwen2_5_vl_7b,
    "tiny-llava": _tiny_llava,
    "tiny-qwen2.5-vl": _tiny_qwen2_5_vl,
}
_ACTION: dict[str, tuple[bool, int]] = {
    "openvla-7b": (False, 0),
    "openvla-oft-7b": (False, 8),
    "tiny-openvla": (True, 0),
    "tiny-openvla-oft": (True, 8),
}
"""Whether a shape is tiny, and the steps of a chunk decoded in parallel, 0 for tokens."""


@dataclass(frozen=True, slots=True)
class _FlowShape:
    """shuffle: see `FlowSubject`. text: places of the instruction, and of the state where the
    expert has no token for it. The prefix is made of Llama's layers, which in Gemma's sizes do what
    Gemma's do."""

    vision: Size
    shuffle: int
    prefix: Size
    text: int
    expert: ExpertShape


_TINY_VISION: Size = {**SIGLIP_BASE, **TINY, "patch_size": 8, "image_size": 64}
_TINY_PREFIX: Size = {**TINY, "vocab_size": 300, "head_dim": 16}
_TINY_GEMMA: Size = {**_TINY_PREFIX, "num_key_value_heads": 1, "hidden_act": GEMMA_2B["hidden_act"]}
_FLOW: dict[str, _FlowShape] = {
    "smolvla": _FlowShape(
        SIGLIP_BASE | {"image_size": 512},
        4,
        SMOLVLM2_500M,
        49,
        ExpertShape(720, 2048, crossing=2),
    ),
    "pi0": _FlowShape(
        SIGLIP_SO400M | {"image_size": 224},
        1,
        GEMMA_2B,
        48,
        ExpertShape(1024, 4096, state=32),
    ),
    "pi05": _FlowShape(
        SIGLIP_SO400M | {"image_size": 224},
        1,
        GEMMA_2B,
        200,
        ExpertShape(1024, 4096, modulated=True),
    ),
    "tiny-smolvla": _FlowShape(
        _TINY_VISION,
        2,
        _TINY_PREFIX | {"num_key_value_heads": 2},
        9,
        ExpertShape(48, 96, chunk=5, steps=3, crossing=2),
    ),
    "tiny-pi0": _FlowShape(
        _TINY_VISION,
        1,
        _TINY_GEMMA,
        9,
        ExpertShape(32, 64, chunk=5, steps=3, state=7),
    ),
    "tiny-pi05": _FlowShape(
        _TINY_VISION,
        1,
        _TINY_GEMMA,
        9,
        ExpertShape(32, 64, chunk=5, steps=3, modulated=True),
    ),
}
