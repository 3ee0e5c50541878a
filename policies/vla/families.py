"""lerobot's policies by their type, and the family that knows each one's insides."""

from __future__ import annotations

import importlib
from typing import Any

from stream.errors import AttachError

from .flow_family import FlowFamily

FAMILIES = {
    "smolvla": "policies.vla.smolvla",
    "pi0": "policies.vla.pi0",
    "pi05": "policies.vla.pi05",
}
"""Type of a lerobot policy -> module with a class `Family`."""


def is_lerobot(policy: Any) -> bool:
    """Whether an object is a lerobot policy; imports nothing of lerobot."""
    return any(cls.__module__ == "lerobot.policies.pretrained" for cls in type(policy).__mro__)


def family_of(policy: Any) -> FlowFamily:
    """The family of a lerobot policy; AttachError names the supported ones."""
    kind = str(policy.config.type)
    if kind not in FAMILIES:
        raise AttachError(
            f"No adapter for lerobot policies of type '{kind}'. "
            f"Supported: {', '.join(sorted(FAMILIES))}."
        )
    family: FlowFamily = importlib.import_module(FAMILIES[kind]).Family(policy)
    return family
