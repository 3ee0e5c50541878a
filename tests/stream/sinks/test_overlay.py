"""The overlay: what is drawn where, on hand-made plans."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from stream.data import Frame, PatchGrid, Segment
from stream.errors import ConfigError, ValueShapeError
from stream.plan import Plan
from stream.sinks import overlay
from stream.sinks.patch_paint import ALONE, DROPPED, Fates, hues_of, paint_frame

GREEN = (40, 200, 90)


def plain_frames(count: int, size: tuple[int, int] = (48, 64), step_s: float = 0.5) -> list[Frame]:
    image = np.empty((*size, 3), np.uint8)
    image[:] = GREEN
    return [Frame(image, 10 + step_s * i, i) for i in range(count)]


def merge_over_time() -> Plan:
    """2 frames of 1 x 3: patches 0 and 3 become one token, 4 stays alone, the rest is dropped."""
    row, col = torch.tensor([0, 0, 1]), torch.tensor([0, 3, 4])
    return Plan.merge(torch.tensor([0, 4]), row, col, torch.tensor([0.5, 0.5, 1.0]), 6)


def test_fates_tell_merged_alone_and_dropped_apart() -> None:
    fates = Fates.of(merge_over_time(), PatchGrid(2, 1, 3))
    assert fates.paint.tolist() == [[[0, DROPPED, DROPPED]], [[0, ALONE, DROPPED]]]
    assert fates.anchor.tolist() == [[[0, DROPPED, DROPPED]], [[DROPPED] * 3]]
    assert fates.tokens.tolist() == [1, 1]
    assert fates.merged_rows == 1


def test_a_token_made_from_another_patch_than_its_own_counts_as_merged() -> None:
    plan = Plan.merge(*(torch.tensor(v) for v in ([0], [0], [1], [1.0])), 2)
    fates = Fates.of(plan, PatchGrid(1, 1, 2))
    assert fates.paint.tolist() == [[[DROPPED, 0]]]
    assert fates.anchor.tolist() == [[[0, DROPPED]]]


def test_painting_shows_each_fate() -> None:
    frame = plain_frames(1)[0].image
    fates = Fates.of(merge_over_time(), PatchGrid(2, 1, 3))
    first, second = (paint_frame(frame, t, fates, (20, 20)).astype(int) for t in (0, 1))
    colour = hues_of(1)[0].astype(int)

    assert first.shape == (20, 60, 3)
    assert (first[2, 10] == colour).all(), "the anchor's line is thick"
    assert (second[0, 10] == colour).all(), "a member in another frame has the same colour"
    assert (second[2, 10] == second[10, 10]).all(), "and a thin line"
    assert np.abs(second[10, 10] - np.array(GREEN)).sum() > 30, "merged patches are tinted"
    assert (second[10, 30] == GREEN).all(), "a patch kept alone keeps its picture"
    assert second[0, 30].min() > 150, "inside a white line"
    dropped = first[10, 30]
    assert np.ptp(dropped) == 0, "dropped patches lose their colour"
    assert dropped.max() < 100, "and their light"


def test_tokens_next_to_each_other_have_different_colours() -> None:
    hues = hues_of(3000).astype(int)
    assert np.abs(np.diff(hues, axis=0)).sum(axis=1).min() > 100


@pytest.mark.parametrize("count", [1, 2, 7, 32, 64])
@pytest.mark.parametrize("patches", [(1, 1), (3, 5), (14, 14)])
@pytest.mark.parametrize("kind", ["nothing", "gather", "merge", "identity"])
def test_any_plan_on_any_grid(count: int, patches: tuple[int, int], kind: str) -> None:
    grid = PatchGrid(count, *patches)
    n = grid.size
    some = torch.arange(0, n, 3)
    everything = torch.arange(n)
    plan = {
        "nothing": Plan.keep(torch.empty(0, dtype=torch.long), n),
        "gather": Plan.keep(some, n),
        "merge": Plan.merge(some, everything // 3, everything, torch.ones(n) / 3, n),
        "identity": Plan.identity(n),
    }[kind]
    segments = [Segment(0, count)] if count < 3 else [Segment(0, 1), Segment(1, count)]
    sheet = overlay.draw(plain_frames(count), grid, plan, segments, title="a title")
    assert sheet.mode == "RGB"
    assert sheet.width % 2 == 0
    assert sheet.height % 2 == 0
    assert sheet.width <= 2200


@pytest.mark.parametrize("size", [(1, 1), (17, 31), (400, 20), (20, 400)])
def test_any_picture_size_and_no_segments(size: tuple[int, int]) -> None:
    sheet = overlay.draw(plain_frames(3, size), PatchGrid(3, 4, 4), Plan.identity(48), [])
    assert max(sheet.size) < 3000


def test_equal_times_do_not_break_the_ribbon() -> None:
    frames = plain_frames(3, step_s=0.0)
    segments = [Segment(0, 1), Segment(1, 3)]
    assert overlay.draw(frames, PatchGrid(3, 2, 2), Plan.identity(12), segments).width > 0


def test_cell_px_sets_the_height_of_a_patch() -> None:
    small, large = (
        overlay.draw(plain_frames(2), PatchGrid(2, 4, 4), Plan.identity(32), [], cell_px=px)
        for px in (40, 60)
    )
    assert large.height - small.height == 4 * 20


def test_write_png(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "out.PNG"
    overlay.write(path, plain_frames(2), PatchGrid(2, 1, 3), merge_over_time(), [Segment(0, 2)])
    with Image.open(path) as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize(("step_s", "rate"), [(0.04, 4.0), (0.5, 2.0), (9.0, 1.0), (0.0, 1.0)])
def test_write_mp4_has_one_picture_a_frame_at_a_readable_rate(
    tmp_path: Path, step_s: float, rate: float
) -> None:
    path = tmp_path / "out.mp4"
    frames = plain_frames(5, step_s=step_s)
    overlay.write(path, frames, PatchGrid(5, 3, 3), Plan.identity(45), [Segment(0, 5)])
    with av.open(str(path)) as film:
        stream = film.streams.video[0]
        pictures = list(film.decode(video=0))
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert float(stream.average_rate or 0) == pytest.approx(rate)
    assert len(pictures) == 5
    assert pictures[0].width % 2 == pictures[0].height % 2 == 0


@pytest.mark.parametrize("name", ["out.gif", "out", "out.png.txt"])
def test_other_suffixes_are_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"\.png \(a sheet\) or \.mp4 \(a film\)"):
        overlay.write(tmp_path / name, [], PatchGrid(1, 1, 1), Plan.identity(1), [])
    assert not list(tmp_path.iterdir())


def test_contradictions_are_refused() -> None:
    frames, grid = plain_frames(2), PatchGrid(2, 1, 3)
    with pytest.raises(ValueShapeError, match="1 frames for"):
        overlay.draw(frames[:1], grid, merge_over_time(), [])
    with pytest.raises(ValueShapeError, match="compose the plan"):
        overlay.draw(frames, grid, Plan.identity(5), [])
    with pytest.raises(ValueShapeError, match="ends after"):
        overlay.draw(frames, grid, merge_over_time(), [Segment(0, 3)])
    with pytest.raises(ConfigError, match="cell_px is 3"):
        overlay.draw(frames, grid, merge_over_time(), [], cell_px=3)
