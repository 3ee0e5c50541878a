"""Tiny random lerobot policies, their batches, and the slow truth about a pruned run of theirs."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

SIDE = 4
PER_CAMERA = SIDE**2
STEPS, CHUNK = 4, 6
STATE, ACTION = 5, 4
CAMERAS = ("left", "wrist", "right")
KEYS = tuple(f"observation.images.{name}" for name in CAMERAS)
WORDS = [
    "reach",
    "push",
    "the",
    "red",
    "green",
    "blue",
    "ball",
    "open",
    "drawer",
    "task",
    "state",
    "action",
    ":",
    ";",
    ",",
]


def features() -> dict[str, Any]:
    from lerobot.configs import FeatureType, PolicyFeature

    pictures = {key: PolicyFeature(FeatureType.VISUAL, (3, 64, 64)) for key in KEYS}
    state = {"observation.state": PolicyFeature(FeatureType.STATE, (STATE,))}
    return {
        "input_features": pictures | state,
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (ACTION,))},
        "chunk_size": CHUNK,
        "n_action_steps": CHUNK // 2,
        "max_state_dim": 8,
        "max_action_dim": 8,
        "device": "cpu",
    }


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "<image>", "<fake>", "<global>", "\n", *WORDS]
    own = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=own,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<pad>",
        extra_special_tokens={
            "image_token": "<image>",
            "fake_image_token": "<fake>",
            "global_image_token": "<global>",
        },
    )


@cache
def smolvlm_folder(full_size: bool = False) -> tempfile.TemporaryDirectory[str]:
    """What SmolVLA wants of its `vlm_model_name`: a configuration and a processor.

    full_size: the shapes of SmolVLM2-500M.
    """
    from transformers import (
        SmolVLMConfig,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    folder = tempfile.TemporaryDirectory(prefix="smolvlm-")
    SmolVLMProcessor(
        SmolVLMImageProcessor(), tokenizer(), SmolVLMVideoProcessor(), image_seq_len=PER_CAMERA
    ).save_pretrained(folder.name)
    text = {"vocab_size": 49280, "hidden_size": 960, "intermediate_size": 2560}
    text |= {"num_hidden_layers": 32, "num_attention_heads": 15, "num_key_value_heads": 5}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    vision |= {"num_attention_heads": 12, "image_size": 512, "patch_size": 16}
    if not full_size:
        text = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96}
        text |= {"num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2}
        vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        vision |= {"num_attention_heads": 2, "image_size": 64, "patch_size": 8}
    head = text["hidden_size"] // text["num_attention_heads"]
    SmolVLMConfig(
        text_config={"model_type": "llama", "head_dim": head, "pad_token_id": 0, **text},
        vision_config=vision,
        scale_factor=4 if full_size else 2,
        image_token_id=2,
        pad_token_id=0,
    ).save_pretrained(folder.name)
    return folder


def smolvla(**settings: Any) -> Any:
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    torch.manual_seed(0)
    config = SmolVLAConfig(
        **features(),
        vlm_model_name=smolvlm_folder().name,
        num_vlm_layers=6,
        num_steps=STEPS,
        expert_width_multiplier=0.5,
        resize_imgs_with_padding=(64, 64),
        **settings,
    )
    return SmolVLAPolicy(config).eval()


@contextmanager
def thin_pi(kind: str) -> Iterator[None]:
    """pi0 and pi05 are built with thin towers in place of the fixed wide ones."""
    modeling = importlib.import_module(f"lerobot.policies.{kind}.modeling_{kind}")
    paligemma = modeling.PaliGemmaForConditionalGenerationWithPiGemma
    gemma = modeling.PiGemmaForCausalLM

    def tower(variant: str) -> Any:
        width = {"gemma_2b": 64, "gemma_300m": 32}[variant]
        return modeling.GemmaConfig(width, 6, 96, num_heads=4, num_kv_heads=1, head_dim=16)

    def thin_paligemma(config: Any) -> Any:
        config.text_config.vocab_size = 128
        vision = config.vision_config
        vision.hidden_size, vision.intermediate_size, vision.projection_dim = 32, 48, 64
        vision.num_hidden_layers, vision.num_attention_heads = 1, 2
        return paligemma(config=config)

    def thin_gemma(config: Any) -> Any:
        config.vocab_size = 128
        return gemma(config=config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling, "get_gemma_config", tower)
        patch.setattr(modeling, "PaliGemmaForConditionalGenerationWithPiGemma", thin_paligemma)
        patch.setattr(modeling, "PiGemmaForCausalLM", thin_gemma)
        yield


def _pi(kind: str, **settings: Any) -> Any:
    name = {"pi0": "PI0", "pi05": "PI05"}[kind]
    configs = importlib.import_module(f"lerobot.policies.{kind}.configuration_{kind}")
    modeling = importlib.import_module(f"lerobot.policies.{kind}.modeling_{kind}")
    torch.manual_seed(0)
    with thin_pi(kind):
        config = getattr(configs, f"{name}Config")(
            **features(), num_inference_steps=STEPS, image_resolution=(56, 56), **settings
        )
        policy = getattr(modeling, f"{name}Policy")(config).eval()
    for module in policy.modules():
        if getattr(module, "cond_dim", None):
            torch.nn.init.normal_(module.dense.weight, std=0.2)
            torch.nn.init.normal_(module.dense.bias, std=0.5)
    return policy


def full_size(kind: str, device: str) -> Any:
    """A policy in its own default shape, on a device; on GPUs as precise as checkpoints are."""
    name = {"smolvla": "SmolVLA", "pi0": "PI0", "pi05": "PI05"}[kind]
    configs = importlib.import_module(f"lerobot.policies.{kind}.configuration_{kind}")
    modeling = importlib.import_module(f"lerobot.policies.{kind}.modeling_{kind}")
    shape = {key: features()[key] for key in ("input_features", "output_features")}
    own = (
        {"vlm_model_name": smolvlm_folder(True).name}
        if kind == "smolvla"
        else {"dtype": "bfloat16"}
    )
    torch.manual_seed(0)
    config = getattr(configs, f"{name}Config")(**shape, **own, device=device)
    policy = getattr(modeling, f"{name}Policy")(config).to(device).eval()
    if kind == "smolvla" and device != "cpu":  # which is slow in bfloat16
        policy.model.vlm_with_expert.to(torch.bfloat16)
    return policy


def pi0(**settings: Any) -> Any:
    return _pi("pi0", **settings)


def pi05(**settings: Any) -> Any:
    return _pi("pi05", **settings)


BUILDERS: dict[str, Callable[..., Any]] = {"smolvla": smolvla, "pi0": pi0, "pi05": pi05}


@contextmanager
def local_tokenizer() -> Iterator[None]:
    """The processors of pi0 and pi05 ask for a tokenizer of the hub; here they get the tiny one."""
    module = importlib.import_module("lerobot.processor.tokenizer_processor")
    with pytest.MonkeyPatch.context() as patch:
        own = SimpleNamespace(from_pretrained=lambda name: tokenizer())
        patch.setattr(module, "AutoTokenizer", own)
        yield


def processors(policy: Any) -> tuple[Any, Any]:
    """lerobot's own, with statistics that change something."""
    from lerobot.policies.factory import make_pre_post_processors

    stats = {
        key: {
            "mean": torch.full((size,), 0.25),
            "std": torch.full((size,), 2.0),
            "q01": torch.full((size,), -3.0),
            "q99": torch.full((size,), 4.0),
        }
        for key, size in (("observation.state", STATE), ("action", ACTION))
    }
    with local_tokenizer():
        before, after = make_pre_post_processors(policy.config, dataset_stats=stats)
    return before, after


def batch(
    rows: int = 1, seed: int = 1, cameras: tuple[str, ...] = CAMERAS, pixels: int = 64
) -> dict[str, Any]:
    """Model inputs; the instruction is padded on the right, as lerobot's tokenizer step does."""
    generator = torch.Generator().manual_seed(seed)
    pictures = {
        f"observation.images.{name}": torch.rand(rows, 3, pixels, pixels, generator=generator)
        for name in CAMERAS
    }
    words = torch.randint(6, 20, (rows, 9), generator=generator)
    mask = torch.ones(rows, 9, dtype=torch.bool)
    mask[:, 7:] = False
    return {key: pictures[key] for key in KEYS if key.rsplit(".", 1)[1] in cameras} | {
        "observation.state": torch.randn(rows, STATE, generator=generator),
        "observation.language.tokens": words * mask,
        "observation.language.attention_mask": mask,
    }


def noise(rows: int = 1) -> Tensor:
    return torch.randn(rows, CHUNK, 8, generator=torch.Generator().manual_seed(2))


@contextmanager
def watched(policy: Any) -> Iterator[list[tuple[Tensor, list[int]]]]:
    """(velocity, cache lengths) after each flow step inside the block."""
    seen: list[tuple[Tensor, list[int]]] = []
    step = policy.model.denoise_step

    def denoise_step(*args: Any, **kwargs: Any) -> Tensor:
        velocity: Tensor = step(*args, **kwargs)
        layers = kwargs["past_key_values"].layers
        seen.append((velocity.detach().clone(), [layer.get_seq_length() for layer in layers]))
        return velocity

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vars(policy.model), "denoise_step", denoise_step)
        yield seen


class Truth:
    """A run at full length in which the dropped places are hidden from a layer on.

    hidden: by layer, long places of the prefix that no other token may look at from there on.
    prefix, expert: attention of each layer, float32 [h, rows, keys], one row of a batch; of the
    expert the mean over flow steps. Fill them by running the policy inside the block.
    """

    def __init__(self, policy: Any, hidden: dict[int, Tensor] | None = None) -> None:
        self.policy = policy
        self.hidden = hidden or {}
        self.prefix: list[Tensor] = []
        self.steps: list[list[Tensor]] = []

    @property
    def expert(self) -> list[Tensor]:
        """By layer, over the prefix alone: [rows, places]."""
        length = self.prefix[0].shape[-1]
        rows = [[w.mean(0)[:, :length] for w in step] for step in self.steps]
        return [torch.stack(layer).mean(0) for layer in zip(*rows, strict=True)]

    def hide(self, layer: int, visible: Tensor, prefill: bool) -> Tensor:
        """visible: bool [b, rows, keys] -> the same without what is hidden at this layer."""
        visible = visible.clone()
        for first, places in self.hidden.items():
            if layer >= first:
                own = visible[:, places, places].clone() if prefill else None
                visible[:, :, places] = False
                if own is not None:
                    visible[:, places, places] = own
        return visible

    @contextmanager
    def running(self) -> Iterator[Truth]:
        with _HIDING[self.policy.config.type](self):
            yield self


@contextmanager
def _hiding_in_smolvla(truth: Truth) -> Iterator[None]:
    towers = truth.policy.model.vlm_with_expert
    attend = towers.eager_attention_forward
    calls: list[int] = []

    def attention(
        mask: Tensor, rows: int, width: int, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        step, layer = divmod(len(calls), towers.num_vlm_layers)
        calls.append(layer)
        mask = truth.hide(layer, mask, prefill=step == 0)
        groups = query.shape[2] // key.shape[2]
        keys = key.repeat_interleave(groups, 2)
        logits = torch.einsum("bqhd,bkhd->bhqk", query.float(), keys.float())
        logits = (logits * width**-0.5).masked_fill(~mask[:, None], torch.finfo(torch.float32).min)
        weights = logits.softmax(-1)[0].detach()
        if step == 0:
            truth.prefix.append(weights)
        elif layer == 0:
            truth.steps.append([weights])
        else:
            truth.steps[-1].append(weights)
        output: Tensor = attend(mask, rows, width, query, key, value)
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vars(towers), "eager_attention_forward", attention)
        yield


@contextmanager
def _hiding_in_pi(truth: Truth) -> Iterator[None]:
    towers = truth.policy.model.paligemma_with_expert
    prefix, expert = towers.paligemma.model.language_model.layers, towers.gemma_expert.model.layers

    def hide(layer: int, prefill: bool) -> Any:
        def pre(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            visible = truth.hide(layer, kwargs["attention_mask"][:, 0] == 0, prefill)
            mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[:, None]
            return args, kwargs | {"attention_mask": mask}

        return pre

    def note(layer: int, prefill: bool) -> Any:
        def post(module: Any, args: Any, output: Any) -> None:
            weights = output[1][0].detach()
            if prefill:
                truth.prefix.append(weights)
            elif layer == 0:
                truth.steps.append([weights])
            else:
                truth.steps[-1].append(weights)

        return post

    hooks = []
    for tower, prefill in ((prefix, True), (expert, False)):
        for layer, block in enumerate(tower):
            own = block.self_attn
            hooks += [
                own.register_forward_pre_hook(hide(layer, prefill), with_kwargs=True),
                own.register_forward_hook(note(layer, prefill)),
            ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


_HIDING: dict[str, Callable[[Truth], Any]] = {
    "smolvla": _hiding_in_smolvla,
    "pi0": _hiding_in_pi,
    "pi05": _hiding_in_pi,
}
