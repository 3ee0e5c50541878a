"""Tiny random OpenVLA-shaped policies and what they see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policies.graphs.wanted import Capture
from policies.vla.openvla import OpenVLAPolicy
from policies.vla.openvla_model import OpenVLA, OpenVLAConfig
from policies.vla.tiny.modeling import make_tokenizer
from stream.data import Observation
from stream.reducers.base import Reducer

PX, LAYERS = 32, 4
TEXTS = ("open the drawer", "push the yellow puck to the red ball")
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": PX,
    "patch_size": 8,
    "vision_use_head": False,
}
DINOV2 = {
    "model_type": "dinov2_with_registers",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": PX,
    "patch_size": 8,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def network(head: str, **changes: Any) -> OpenVLA:
    """Two cameras of 4 x 4 tokens; the same weights every time."""
    torch.manual_seed(0)
    text = {
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
    }
    settings: dict[str, Any] = {
        "vision_configs": [SIGLIP],
        "image_px": PX,
        "cameras": ["scene", "wrist"],
        "text_config": text,
        "head": head,
        "chunk": 3,
        "execute": 3,
        "action_size": 2,
        "state_size": 4,
        "state_mean": [0.1, 0.2, 0.3, 0.4],
        "state_std": [1.0, 2.0, 1.0, 0.5],
        "action_low": [-1.0, -2.0],
        "action_high": [1.0, 4.0],
        "prompt": "{instruction}",
    }
    model = OpenVLA(OpenVLAConfig(**(settings | changes)))
    with torch.no_grad():
        for parameter in (*model.projector.parameters(), *model.queries.parameters()):
            parameter.normal_(std=0.3)
    return model


def policy(
    head: str,
    reducer: Reducer | None = None,
    capture: Capture = "auto",
    device: str = "cpu",
    **changes: Any,
) -> OpenVLAPolicy:
    model = network(head, **changes).to(device)
    return OpenVLAPolicy(model, make_tokenizer(TEXTS), reducer, capture=capture)


def observation(
    seed: int = 0, text: int = 0, missing: str | None = None, time_s: float = 0.0
) -> Observation:
    rng = np.random.default_rng(seed)
    images = {
        camera: rng.integers(0, 256, (PX, PX, 3), dtype=np.uint8) for camera in ("scene", "wrist")
    }
    shown = {c: None if c == missing else image for c, image in images.items()}
    return Observation(shown, rng.normal(size=4).astype(np.float32), TEXTS[text], time_s)


@contextmanager
def hidden_from(model: OpenVLA, layer: int, gone: Tensor) -> Iterator[None]:
    """The slow truth: from a layer on, the places `gone` of the sequence are keys of no other."""

    def pre(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = args[0].shape[1]
        past = kwargs["past_key_values"].get_seq_length(module.self_attn.layer_idx)
        row, key = torch.arange(past, past + new)[:, None], torch.arange(past + new)
        seen = (key <= row) & (~torch.isin(key, gone) | (key == row))
        return args, {**kwargs, "attention_mask": seen[None, None]}

    with ExitStack() as stack:
        for module in list(model.language_model.layers)[layer:]:
            hook = module.register_forward_pre_hook(pre, with_kwargs=True)
            stack.callback(hook.remove)
        yield
