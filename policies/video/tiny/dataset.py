"""Held-out clips as real h264 files, and the manifest that goes with them.

    python -m policies.video.tiny.dataset --split heldout --n-videos 100 --out DIR

A clip lasts 12 to 16 s at 12 frames a second. It depends on (split, index) only, so a folder that
was interrupted is completed, and one that is complete is left alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import av
import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from .questions import Question, draw_questions
from .render import pack_scenes, render
from .world import FRAME_PX, Scene, Split, make_scene

FPS = 12
QUESTIONS_PER_VIDEO = 12
ENCODER_OPTIONS = {"crf": "20", "preset": "medium", "threads": "1"}


@dataclass(frozen=True, slots=True)
class Item:
    """One question about one file."""

    video: Path
    question: Question


def ask(scene: Scene) -> list[Question]:
    """The questions of a held-out scene: up to a dozen, none twice."""
    rng = random.Random(f"{scene.split}/{scene.index}/questions")
    return list(dict.fromkeys(draw_questions(scene, QUESTIONS_PER_VIDEO, rng)))


def write_clip(scene: Scene, path: Path) -> None:
    """Render a scene and encode it as h264 4:2:0; the file appears only once it is whole."""
    batch = pack_scenes([scene])
    times_s = torch.arange(int(scene.duration_s * FPS)) / FPS
    partial = path.with_suffix(".partial")
    with av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options=ENCODER_OPTIONS)
        stream.width = stream.height = FRAME_PX
        stream.pix_fmt = "yuv420p"
        for some_s in times_s.split(24):
            frames = render(batch, some_s[None])[0]
            pixels = (frames * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
            for image in pixels.numpy():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    partial.rename(path)


def read_frames(path: Path, n_frames: int) -> Tensor:
    """Frames of a file, each from the middle of its share: [T, 3, 224, 224] in [0, 1]."""
    with av.open(str(path)) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    chosen = ((np.arange(n_frames) + 0.5) / n_frames * len(decoded)).astype(int)
    stacked = np.stack([decoded[i] for i in chosen])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255


def build(split: Split, n_videos: int, out: Path, *, processes: int | None = None) -> Path:
    """Write what is missing of a split's first `n_videos` clips; returns the manifest's path."""
    out.mkdir(parents=True, exist_ok=True)
    missing = [i for i in range(n_videos) if not _clip_path(out, split, i).exists()]
    if missing:
        clean = multiprocessing.get_context("forkserver")  # a fork of a threaded torch may hang
        with ProcessPoolExecutor(processes, mp_context=clean) as pool:
            jobs = [pool.submit(_write, split, index, out) for index in missing]
            for job in track(as_completed(jobs), f"writing {split} clips", total=len(jobs)):
                job.result()
    manifest = out / f"{split}_{n_videos}.jsonl"
    lines = []
    for index in range(n_videos):
        name = _clip_path(out, split, index).name
        for question in ask(make_scene(split, index)):
            record = asdict(question)
            row = {"video": name, "question": record.pop("text"), **record}
            lines.append(json.dumps(row))
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


def load(manifest: Path) -> list[Item]:
    """The items of a manifest, in order; videos are looked for beside it."""
    return [_item(json.loads(line), manifest) for line in manifest.read_text().splitlines()]


def load_samples(checkpoint: Path) -> list[Item]:
    """The questions about the clips that are shipped beside a checkpoint."""
    listing = checkpoint / "samples" / "samples.json"
    return [_item(row, listing) for row in json.loads(listing.read_text())]


def _item(row: Mapping[str, Any], listing: Path) -> Item:
    question = Question(row["type"], row["question"], row["answer"], tuple(row["choices"]))
    return Item(listing.parent / row["video"], question)


def by_video(items: Sequence[Item]) -> Mapping[Path, list[Item]]:
    """Items grouped by file, in the order of the manifest."""
    groups: dict[Path, list[Item]] = {}
    for item in items:
        groups.setdefault(item.video, []).append(item)
    return groups


def _clip_path(out: Path, split: Split, index: int) -> Path:
    return out / f"{split}_{index:05d}.mp4"


def _write(split: Split, index: int, out: Path) -> None:
    torch.set_num_threads(1)
    write_clip(make_scene(split, index), _clip_path(out, split, index))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=get_args(Split), default="heldout")
    parser.add_argument("--n-videos", type=int, default=100)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    print(build(args.split, args.n_videos, args.out, processes=args.processes))  # noqa: T201


if __name__ == "__main__":
    main()
