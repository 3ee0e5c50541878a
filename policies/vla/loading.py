"""Loading a robot policy by a name in the box, a local folder or a hub name."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from stream.errors import AttachError
from stream.reducers.base import Reducer

from ..graphs.wanted import Capture
from ..models import in_the_box
from .base import VLAPolicy
from .families import FAMILIES

LOADERS = {
    "foveate_openvla": "policies.vla.openvla",
    **dict.fromkeys(FAMILIES, "policies.vla.flow_policy"),
}
"""`type` (lerobot) or `model_type` (transformers) of a checkpoint's config.json -> the module
whose `load(name, reducer, device, capture)` gives the policy."""


def load(
    name: str,
    reducer: Reducer | None = None,
    device: str | None = None,
    capture: Capture = "auto",
) -> VLAPolicy:
    """A robot policy, pruned by a reducer.

    name: of a policy in the box, a folder, or a hub name. device: default is CUDA where there is
    one. capture: whether it runs in fixed shapes, where it can. Raises AttachError for what cannot
    be loaded.
    """
    where = str(in_the_box("robot").get(name, name))
    config = _config(where)
    kind = config.get("type") or config.get("model_type")
    if kind not in LOADERS:
        raise AttachError(
            f"'{name}' is a '{kind}' model; robot policies are {', '.join(sorted(LOADERS))}."
        )
    loader = importlib.import_module(LOADERS[kind])
    policy: VLAPolicy = loader.load(where, reducer, device, capture)
    return policy


def _config(where: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = Path(where)
        path = folder / "config.json" if folder.is_dir() else hf_hub_download(where, "config.json")
        config: dict[str, Any] = json.loads(Path(path).read_text())
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise AttachError(
            f"There is no policy '{where}': {str(error).splitlines()[0]} "
            f"Give one of {', '.join(in_the_box('robot'))}, a folder, or a hub name."
        ) from error
    return config
