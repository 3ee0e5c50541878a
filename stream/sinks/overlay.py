"""Draw what became of every patch: a contact sheet, or a film of one picture a frame.

Knows values only (frames, a grid, a plan, segments); no model and no reducer. One box is one token:
dropped patches are grey and dark, patches kept alone have a white line, and merged patches wear the
colour of the output token they went into, in whatever frame they are. The patch that lends a merged
token its position has a thick line, the others a thin one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..data import Frame, PatchGrid, Segment
from ..errors import ConfigError, ValueShapeError
from ..plan import Plan
from .patch_paint import ALONE, DROPPED, Fates, Pixels, paint_frame

Colour = tuple[int, int, int]

SUFFIXES = (".png", ".mp4")

PAGE: Colour = (17, 20, 24)
INK: Colour = (236, 239, 244)
FAINT: Colour = (150, 158, 170)
BANDS: tuple[Colour, Colour] = ((62, 84, 122), (92, 104, 124))
MARGIN, GAP, LABEL, RIBBON, LINE = 20, 10, 24, 74, 26
SHEET_WIDTH, TILE_WIDTH, MIN_WIDTH, SHEET_ASPECT = 1800, 640, 720, 1.6
SLOWEST_HZ, FASTEST_HZ = 1.0, 4.0


def draw(
    frames: Sequence[Frame],
    grid: PatchGrid,
    plan: Plan,
    segments: Sequence[Segment],
    *,
    cell_px: int | None = None,
    title: str | None = None,
) -> Image.Image:
    """All frames on one sheet, a ribbon of the segments over time, and a legend with counts.

    frames: one for each frame of `grid`; where the model folds several pictures into one grid
        frame, give the one that stands for it.
    plan: over the whole grid (`plan.n == grid.size`); compose later stages onto earlier ones first.
    segments: spans of grid frames; may be empty.
    cell_px: height of a patch in pixels, at least 4; chosen from the number of frames when None.

    Raises ValueShapeError when frames, grid, plan and segments contradict each other, ConfigError
    for a cell that is too small.
    """
    _check(frames, grid, plan, segments, cell_px)
    fates = Fates.of(plan, grid)
    columns = _columns(len(frames), frames[0])
    cell = _cell(frames[0], grid, cell_px, min(TILE_WIDTH, SHEET_WIDTH // columns))
    tiles = [
        _tile(frame, t, fates, cell, _segment_at(segments, t)) for t, frame in enumerate(frames)
    ]
    wide, high = tiles[0].size
    lines = -(-len(tiles) // columns)
    block = Image.new("RGB", (columns * (wide + GAP) - GAP, lines * (high + GAP) - GAP), PAGE)
    for t, tile in enumerate(tiles):
        block.paste(tile, (t % columns * (wide + GAP), t // columns * (high + GAP)))
    width = max(block.width, MIN_WIDTH)
    parts = [block, _ribbon(width, frames, segments, fates, None), _legend(width, fates, plan.k)]
    return _stack(parts, width, title)


def write(
    path: str | Path,
    frames: Sequence[Frame],
    grid: PatchGrid,
    plan: Plan,
    segments: Sequence[Segment],
    *,
    cell_px: int | None = None,
    title: str | None = None,
) -> None:
    """Write the sheet (.png) or a film with one picture a frame (.mp4); arguments as for `draw`.

    The film runs at the frames' own mean rate, held between 1 and 4 pictures a second.
    Raises ConfigError for any other suffix, before anything is drawn.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"The overlay cannot be written to {path.name!r}: its name must end in "
            f"{' (a sheet) or '.join(SUFFIXES)} (a film)."
        )
    _check(frames, grid, plan, segments, cell_px)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".png":
        draw(frames, grid, plan, segments, cell_px=cell_px, title=title).save(path, format="PNG")
        return
    fates = Fates.of(plan, grid)
    cell = _cell(frames[0], grid, cell_px, MIN_WIDTH)
    legend = _legend(max(cell[0] * grid.cols, MIN_WIDTH), fates, plan.k)
    pictures = (
        _stack(
            [
                _tile(frame, t, fates, cell, _segment_at(segments, t)),
                _ribbon(legend.width, frames, segments, fates, t),
                legend,
            ],
            legend.width,
            title,
        )
        for t, frame in enumerate(frames)
    )
    span = frames[-1].pts_s - frames[0].pts_s
    rate = (len(frames) - 1) / span if span > 0 else SLOWEST_HZ
    _encode(path, pictures, min(max(rate, SLOWEST_HZ), FASTEST_HZ))


def _check(
    frames: Sequence[Frame],
    grid: PatchGrid,
    plan: Plan,
    segments: Sequence[Segment],
    cell_px: int | None,
) -> None:
    if len(frames) != grid.frames:
        raise ValueShapeError(f"{len(frames)} frames for {grid}; give one for each grid frame.")
    if plan.n != grid.size:
        raise ValueShapeError(
            f"The plan maps {plan.n} tokens and {grid} has {grid.size} patches; "
            "compose the plan onto the one that took the whole grid (later @ earlier)."
        )
    if any(s.stop > grid.frames for s in segments):
        raise ValueShapeError(f"{max(segments, key=lambda s: s.stop)} ends after {grid}.")
    if cell_px is not None and cell_px < 4:
        raise ConfigError(f"cell_px is {cell_px}; a patch needs at least 4 pixels to be seen.")


def _columns(count: int, frame: Frame) -> int:
    """Tiles in a line, so that the sheet is about as wide as a screen and its last line full."""
    high, wide, _ = frame.image.shape
    columns = np.arange(1, count + 1)
    lines = -(-count // columns)
    aspect = np.clip(wide / high, 0.5, 3) * columns / lines
    empty = 1 - count / (columns * lines)
    return int(columns[np.argmin(np.abs(np.log(aspect / SHEET_ASPECT)) + 4 * empty)])


def _cell(frame: Frame, grid: PatchGrid, cell_px: int | None, tile_width: int) -> tuple[int, int]:
    """(width, height) of a patch in pixels; keeps the picture's own proportions within 1:4."""
    high, wide, _ = frame.image.shape
    aspect = float(np.clip((wide / grid.cols) / (high / grid.rows), 0.25, 4))
    if cell_px is None:
        cell_px = max(4, int(min(tile_width / grid.cols / aspect, TILE_WIDTH / grid.rows)))
    return max(4, round(cell_px * aspect)), cell_px


def _segment_at(segments: Sequence[Segment], t: int) -> int | None:
    return next((i for i, s in enumerate(segments) if s.start <= t < s.stop), None)


def _count(number: int, noun: str) -> str:
    plural = "es" if noun.endswith("ch") else "s"
    return f"{number} {noun}{plural if number != 1 else ''}"


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _tile(
    frame: Frame, t: int, fates: Fates, cell: tuple[int, int], segment: int | None
) -> Image.Image:
    """A painted frame under a line that says its segment, its time and its tokens."""
    picture = Image.fromarray(paint_frame(frame.image, t, fates, cell))
    tile = Image.new("RGB", (max(picture.width, 120), picture.height + LABEL), PAGE)
    tile.paste(picture, (0, LABEL))
    pen = ImageDraw.Draw(tile)
    font = _font(13)
    x = 0
    if segment is not None:
        name = f"S{segment + 1}"
        x = int(pen.textlength(name, font)) + 12
        pen.rounded_rectangle((0, 2, x, LABEL - 5), 4, BANDS[segment % 2])
        pen.text((6, 11), name, INK, font, anchor="lm")
        x += 6
    pen.text((x, 11), f"{frame.pts_s:.2f} s", INK, font, anchor="lm")
    text = _count(int(fates.tokens[t]), "token")
    if x + 64 + pen.textlength(text, font) < tile.width:
        pen.text((tile.width - 1, 11), text, FAINT, font, anchor="rm")
    return tile


def _ribbon(
    width: int,
    frames: Sequence[Frame],
    segments: Sequence[Segment],
    fates: Fates,
    now: int | None,
) -> Image.Image:
    """Segments over time with their boundaries in seconds; `now` marks a frame with a playhead."""
    times = np.array([f.pts_s for f in frames])
    gap = float(np.median(np.diff(times))) if len(times) > 1 else 1.0
    edges = np.append(times, times[-1] + max(gap, 1e-3))
    place = (edges - edges[0]) / max(float(np.ptp(edges)), 1e-6) * (width - 1)
    place = place.clip(0, width - 1)

    band = Image.new("RGB", (width, RIBBON), PAGE)
    pen = ImageDraw.Draw(band)
    font = _font(13)
    top, bottom = 8, 40
    pen.rectangle((0, top, width - 1, bottom), (34, 39, 47))
    for i, s in enumerate(segments):
        left, right = place[s.start], place[s.stop]
        pen.rectangle((left, top, right, bottom), BANDS[i % 2])
        count = int(fates.tokens[s.start : s.stop].sum())
        for text in (
            f"S{i + 1}: {_count(len(s), 'frame')}, {_count(count, 'token')}",
            f"S{i + 1}: {count}",
            f"S{i + 1}",
        ):
            if pen.textlength(text, font) + 8 < right - left:
                pen.text(((left + right) / 2, 21), text, INK, font, anchor="mm")
                break
    for x in place[:-1]:
        pen.line((x, bottom - 7, x, bottom), FAINT)
    bounds = sorted({0, *(b for s in segments for b in (s.start, s.stop)), len(frames)})
    if len(frames) == 1:
        bounds = [0]
    clear = 0.0
    for b in bounds:
        text = f"{edges[b]:.2f} s"
        half = pen.textlength(text, font) / 2
        middle = min(max(float(place[b]), half), width - 1 - half)
        pen.line((place[b], top - 4, place[b], bottom + 4), INK, 2)
        if middle - half >= clear and (b == bounds[-1] or middle + half < width - 2 * half - 8):
            pen.text((middle, bottom + 16), text, INK, font, anchor="mm")
            clear = middle + half + 8
    if now is not None:
        pen.rectangle((place[now], top - 4, place[now + 1], bottom + 4), None, (255, 214, 64), 3)
    return band


def _legend(width: int, fates: Fates, tokens_out: int) -> Image.Image:
    """The counts in one line and a sample of each kind of patch, wrapped to `width`."""
    total = fates.paint.size
    counts = {
        "alone": int((fates.paint == ALONE).sum()),
        "merged": int((fates.paint >= 0).sum()),
        "dropped": int((fates.paint == DROPPED).sum()),
    }
    items = [("alone", f"{counts['alone']} kept alone")]
    if fates.merged_rows:
        text = f"{counts['merged']} merged into {fates.merged_rows}"
        items.append(
            (
                "merged",
                f"{text} (same colour = same token, thick line = the patch whose place it takes)",
            )
        )
    items.append(("dropped", f"{counts['dropped']} dropped"))

    font = _font(14)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    samples = {name: Image.fromarray(_sample(name)) for name, _ in items}
    spots: list[tuple[int, int]] = []
    x, y = 0, LINE
    for name, text in items:
        needs = samples[name].width + 8 + int(measure.textlength(text, font))
        if x and x + needs > width:
            x, y = 0, y + LINE
        spots.append((x, y))
        x += needs + 28

    box = Image.new("RGB", (width, y + LINE), PAGE)
    pen = ImageDraw.Draw(box)
    share = f"{100 * tokens_out / total:.1f} %"
    head = f"{_count(total, 'patch')} in, {_count(tokens_out, 'token')} out ({share})"
    pen.text((0, LINE // 2), head, INK, _font(17), anchor="lm")
    for (name, text), (x, y) in zip(items, spots, strict=True):
        box.paste(samples[name], (x, y + 4))
        pen.text((x + samples[name].width + 8, y + LINE // 2), text, INK, font, anchor="lm")
    return box


def _sample(kind: str) -> Pixels:
    """A few patches of one kind, painted as in the frames: uint8 [18, width, 3]."""
    shade = np.linspace(120, 220, 64, dtype=np.uint8)[None, :, None].repeat(18, 0).repeat(3, 2)
    paint = {"alone": [ALONE], "merged": [0, 0, 1], "dropped": [DROPPED]}[kind]
    fates = Fates(
        paint=np.array([[paint]]),
        owner=np.array([[paint]]),
        anchor=np.array([[[0, DROPPED, DROPPED] if kind == "merged" else [DROPPED]]]),
        tokens=np.zeros(1, np.int64),
        merged_rows=0,
    )
    return paint_frame(shade, 0, fates, (18, 18))


def _stack(parts: Sequence[Image.Image], width: int, title: str | None) -> Image.Image:
    """Parts below each other on one page, even-sized, with the title on top."""
    head = 40 if title else 0
    high = head + sum(p.height for p in parts) + GAP * (len(parts) - 1)
    page = Image.new(
        "RGB", ((width + 2 * MARGIN + 1) // 2 * 2, (high + 2 * MARGIN + 1) // 2 * 2), PAGE
    )
    if title:
        ImageDraw.Draw(page).text((MARGIN, MARGIN + 10), title, INK, _font(22), anchor="lm")
    y = MARGIN + head
    for part in parts:
        page.paste(part, (MARGIN + (width - part.width) // 2, y))
        y += part.height + GAP
    return page


def _encode(path: Path, pictures: Iterable[Image.Image], rate_hz: float) -> None:
    """Write pictures of one even size as h264 in yuv420p."""
    with av.open(str(path), "w", format="mp4") as film:
        stream = film.add_stream("libx264", rate=Fraction(rate_hz).limit_denominator(1000))
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "18", "preset": "veryfast"}
        for picture in pictures:
            stream.width, stream.height = picture.size
            film.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")))
        film.mux(stream.encode())
