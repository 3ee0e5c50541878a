"""tiny-vla: batches of demonstrations, losses, and a whole training of two steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from policies.vla import load
from policies.vla.tiny import train
from policies.vla.tiny.demos import SHIFT_PX, Demonstrations, Recording, running_share
from policies.vla.tiny.modeling import CHUNK, make_config, make_model, make_tokenizer
from stream.data import Budget, Observation
from stream.errors import SourceError
from stream.memory import Memory

TEXTS = ["open the drawer", "reach the red ball"]


def write(folder: Path, lengths: tuple[int, ...] = (11, 3, 6)) -> Path:
    """Episodes whose pictures and actions say which frame they are of."""
    folder.mkdir()
    n = sum(lengths)
    images = np.zeros((n, 2, 128, 128, 3), np.uint8)
    images[:] = np.arange(n, dtype=np.uint8)[:, None, None, None, None]
    np.save(folder / "images.npy", images)
    pixels = np.full((n, 2, 3, 2), 64.0, np.float32)
    pixels[:, :, 1] = np.nan
    np.savez(
        folder / "rows.npz",
        state=np.random.default_rng(0).normal(size=(n, 4)).astype(np.float32),
        action=np.repeat(np.arange(n, dtype=np.float32)[:, None] / 100, 4, axis=1),
        pixels=pixels,
        starts=np.cumsum([0, *lengths]),
        task=np.array([0, 1, 1]),
        instruction=np.array([0, 1, 1]),
    )
    about = {
        "tasks": ["metaworld:drawer-open", "metaworld:reach"],
        "instructions": TEXTS,
        "cameras": ["scene", "wrist"],
        "dt_s": 0.0125,
    }
    (folder / "about.json").write_text(json.dumps(about))
    return folder


@pytest.fixture
def demos(tmp_path: Path) -> Demonstrations:
    recordings = [Recording.open(write(tmp_path / name)) for name in "ab"]
    tokenizer = make_tokenizer(TEXTS)
    return Demonstrations.of(
        recordings, tokenizer, [0.0] * 4, [1.0] * 4, {"metaworld:reach": 3.0}, torch.device("cpu")
    )


def test_a_batch_is_of_moments_and_what_followed_in_their_episode(demos: Demonstrations) -> None:
    batch = demos.draw(64, torch.Generator().manual_seed(0))
    ends = [10, 13, 19, 30, 33, 39]
    for i in range(64):
        brightness = batch.images[i, 0, 64, 64, 0]
        first = int((batch.actions[i, 0, 0] * 100).round())
        assert abs(brightness / max(first, 1) - 1) <= 0.21 or first == 0
        frames = (batch.actions[i, :, 0] * 100).round().long().tolist()
        last = min(e % 20 for e in ends if e % 20 >= first)
        assert frames == [min(first + k, last) for k in range(CHUNK)]
        assert batch.valid[i].tolist() == [first + k <= last for k in range(CHUNK)]
        said = TEXTS[0] if first <= 10 else TEXTS[1]
        assert int(batch.text_length[i]) == len(said.split())
    seen = batch.pixels[:, :, [0, 2]]
    assert ((seen - 64).abs() <= SHIFT_PX).all()
    assert seen.unique().numel() > 3
    assert batch.pixels[:, :, 1].isnan().all()


def test_tasks_are_drawn_by_weight() -> None:
    share = running_share(np.array(["a", "a", "a", "b"]), {"b": 3.0})
    assert share.diff(prepend=torch.zeros(1)).tolist() == pytest.approx([1 / 12] * 3 + [9 / 12])


def test_pointing_is_rewarded_on_the_right_patch(demos: Demonstrations) -> None:
    batch = demos.draw(4, torch.Generator().manual_seed(1))
    config = make_config(
        ["scene", "wrist"],
        16,
        state_mean=[0.0] * 4,
        state_std=[1.0] * 4,
        action_size=4,
        dt_s=0.1,
        pointers=3,
        vision_layers=1,
        layers=1,
    )
    model = make_model(config, 0)
    with torch.no_grad():
        model.pointer.weight.zero_()  # type: ignore[union-attr]
        model.pointer.bias.fill_(1.0)  # type: ignore[union-attr]
        visual = torch.zeros(4, 512, 384)
        chance = float(train.pointing_loss(model, visual, batch))
        row, col = (batch.pixels[:, :, 0] / 8).long().unbind(-1)
        for camera in range(2):
            place = camera * 256 + row[:, camera] * 16 + col[:, camera]
            visual[torch.arange(4), place] = 1.0
        right = float(train.pointing_loss(model, visual, batch))
        wrong = float(train.pointing_loss(model, visual.roll(5, 1), batch))
    assert chance == pytest.approx(np.log(256), abs=1e-3)
    assert right < 1.0 < chance < wrong


def test_a_whole_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = write(tmp_path / "demos"), tmp_path / "model"
    sizes = "--batch 2 --max-steps 2 --vision-layers 1 --layers 2 --warmup-steps 1"
    monkeypatch.setattr(
        sys, "argv", ["train", "--data", str(data), "--out", str(out), *sizes.split()]
    )
    train.main()
    assert json.loads((out / "training.json").read_text())["frames"] == 20
    assert all(p.stat().st_size <= 16 << 20 for p in out.glob("*.safetensors"))
    policy = load(str(out), device="cpu")
    assert (policy.spec.chunk, policy.spec.grid.size, policy.spec.dt_s) == (8, 512, 0.0125)
    image = np.zeros((128, 128, 3), np.uint8)
    seen = Observation(dict.fromkeys(policy.spec.cameras, image), np.zeros(4, np.float32), "go", 0)
    prefix = policy.prefill(policy.encode(seen), Budget(512), Memory())
    assert policy.act(prefix, seen)[0].actions.shape == (8, 4)


def test_a_folder_without_demonstrations(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="write them with"):
        Recording.open(tmp_path)
