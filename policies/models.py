"""What is in the box, and loading a video LLM by a name in it, a local folder or a hub name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from stream.errors import AttachError

from .adapter import supported

CHECKPOINTS = Path(__file__).parent / "checkpoints"


def in_the_box(kind: Literal["video", "robot"] = "video") -> dict[str, Path]:
    """Names of the shipped models of a kind and where they lie; '-' in a name is '_' on disk."""
    configs = sorted(CHECKPOINTS.glob("*/config.json"))
    robots = {c for c in configs if "action_size" in json.loads(c.read_text())}
    chosen = (c for c in configs if (c in robots) == (kind == "robot"))
    return {c.parent.name.replace("_", "-"): c.parent for c in chosen}


def quiet() -> None:
    """No progress bars or advice from transformers in this process."""
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def load(
    name: str = "tiny-video", device: str | None = None, dtype: torch.dtype | None = None
) -> tuple[Any, Any]:
    """(model in eval mode, processor).

    device: default is CUDA where there is one. dtype: default is float32 on a CPU and bfloat16 on
    a GPU. Never runs code from a repository. Raises AttachError for what cannot be loaded.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    where = str(in_the_box().get(name, name))
    try:
        config = AutoConfig.from_pretrained(where)
        if config.model_type not in supported():
            raise AttachError(
                f"'{name}' is a {config.model_type} model; supported are {', '.join(supported())}."
            )
        processor = AutoProcessor.from_pretrained(where)  # type: ignore[no-untyped-call]
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            where, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise AttachError(
            f"Model '{name}' cannot be loaded: {str(error).splitlines()[0]} "
            f"Give one of {', '.join(in_the_box())}, a folder, or a hub name."
        ) from error
    model, notes = loaded
    if missing := sorted(notes["missing_keys"]):
        raise AttachError(
            f"The checkpoint '{name}' lacks {len(missing)} weights of a {config.model_type} "
            f"({missing[0]}, ...), which would be random; save it again with the installed "
            "transformers."
        )
    return model.to(device).eval(), processor
