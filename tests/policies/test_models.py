"""Loading by name: what is refused, and what is said."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from policies.models import in_the_box, load
from stream.errors import AttachError


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "partial"
    shutil.copytree(in_the_box()["tiny-video"], folder)
    shard = next(folder.glob("model-00001-*.safetensors"))
    weights = load_file(shard)
    lost = min(weights)
    save_file({k: v for k, v in weights.items() if k != lost}, shard, {"format": "pt"})
    with pytest.raises(AttachError, match="lacks 1 weights"):
        load(str(folder), "cpu")


def test_an_unknown_name_lists_what_is_in_the_box() -> None:
    with pytest.raises(AttachError, match="tiny-video"):
        load("tiny-vide", "cpu")


def test_video_models_and_robot_policies_are_told_apart() -> None:
    assert list(in_the_box()) == ["tiny-video"]
    assert list(in_the_box("robot")) == ["tiny-vla"]
