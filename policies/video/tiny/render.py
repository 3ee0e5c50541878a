"""Scene scripts to pixels: one renderer for training on a GPU and for writing files on a CPU.

Backgrounds are drawn once a shot and gathered by frame. Things are drawn in small windows and added
by one scatter; they never overlap, so the sum is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .textures import patterns
from .world import COLORS, FRAME_PX, MAX_SHOTS, MAX_THINGS, SHAPES, SURFACES, Scene

WINDOW_PX = 32
GRID = 14
_COLOR_ID = {name: i for i, name in enumerate(COLORS)}
_SHAPE_ID = {name: i for i, name in enumerate((*SHAPES, "blob"))}
_SURFACE_ID = {name: i for i, name in enumerate(SURFACES)}


@dataclass(frozen=True, slots=True)
class SceneBatch:
    """B scripts as tensors, padded to S = MAX_SHOTS shots and K = MAX_THINGS things."""

    shot_start_s: Tensor  # [B, S], infinity where padded
    shot_surface: Tensor  # [B, S] long
    shot_rgb: Tensor  # [B, S, 2, 3] dark, light
    shot_scale: Tensor  # [B, S]
    shot_angle_rad: Tensor  # [B, S]
    shot_seed: Tensor  # [B, S] long
    thing_shape: Tensor  # [B, K] long
    thing_color: Tensor  # [B, K] long, -1 for a colour without a name
    thing_rgb: Tensor  # [B, K, 3]
    thing_span_s: Tensor  # [B, K, 2] start, end; never visible where padded
    thing_xy_px: Tensor  # [B, K, 2]
    thing_velocity_px_s: Tensor  # [B, K, 2]
    thing_diameter_px: Tensor  # [B, K]

    def map(self, function: Callable[[Tensor], Tensor]) -> SceneBatch:
        return SceneBatch(*(function(getattr(self, f.name)) for f in fields(self)))


def pack_scenes(scenes: Sequence[Scene]) -> SceneBatch:
    """Scripts to one batch of CPU tensors."""
    shots: list[tuple[float, ...]] = []
    things: list[tuple[float, ...]] = []
    seeds: list[int] = []
    for scene in scenes:
        last = scene.shots[-1]
        for i in range(MAX_SHOTS):
            shot = scene.shots[i] if i < len(scene.shots) else last
            start_s = shot.start_s if i < len(scene.shots) else float("inf")
            colors = (*shot.dark_rgb, *shot.light_rgb)
            surface = _SURFACE_ID[shot.surface]
            shots.append((start_s, surface, *colors, shot.scale, shot.angle_rad))
            seeds.append(shot.texture_seed)
        for thing in scene.things:
            look = (_SHAPE_ID[thing.shape], _COLOR_ID.get(thing.color, -1), *thing.rgb)
            motion = (thing.x_px, thing.y_px, thing.vx_px_s, thing.vy_px_s)
            things.append((*look, thing.start_s, thing.end_s, *motion, thing.diameter_px))
        things += [(0.0,) * 11 + (1.0,)] * (MAX_THINGS - len(scene.things))
    s = torch.tensor(shots).view(len(scenes), MAX_SHOTS, -1)
    k = torch.tensor(things).view(len(scenes), MAX_THINGS, -1)
    return SceneBatch(
        shot_start_s=s[..., 0],
        shot_surface=s[..., 1].long(),
        shot_rgb=s[..., 2:8].unflatten(-1, (2, 3)),
        shot_scale=s[..., 8],
        shot_angle_rad=s[..., 9],
        shot_seed=torch.tensor(seeds).view(len(scenes), MAX_SHOTS),
        thing_shape=k[..., 0].long(),
        thing_color=k[..., 1].long(),
        thing_rgb=k[..., 2:5],
        thing_span_s=k[..., 5:7],
        thing_xy_px=k[..., 7:9],
        thing_velocity_px_s=k[..., 9:11],
        thing_diameter_px=k[..., 11],
    )


def render(batch: SceneBatch, times_s: Tensor) -> Tensor:
    """Frames at given times: [B, T] seconds -> [B, T, 3, 224, 224] floats in [0, 1]."""
    b, t = times_s.shape
    surfaces = _surfaces(batch)
    shot = shot_index(batch, times_s)
    frames = surfaces[torch.arange(b, device=shot.device)[:, None], shot].flatten(0, 1)
    xy, visible = where_things_are(batch, times_s)

    corner = (xy - WINDOW_PX / 2).floor().clamp(0, FRAME_PX - WINDOW_PX)  # [B, T, K, 2]
    px = torch.arange(WINDOW_PX, device=xy.device)
    local = corner[..., None] + px - xy[..., None]  # [B, T, K, 2, W]
    alpha = _coverage(
        local[..., 0, None, :],
        local[..., 1, :, None],
        batch.thing_diameter_px[:, None, :, None, None] / 2,
        batch.thing_shape[:, None, :, None, None],
    )
    alpha = (alpha * visible[..., None, None]).view(b * t, 1, -1)
    at = corner.long()
    flat = (at[..., 1, None] + px)[..., :, None] * FRAME_PX + (at[..., 0, None] + px)[..., None, :]
    flat = flat.view(b * t, 1, -1).expand(-1, 3, -1)
    rgb = batch.thing_rgb.mT[:, None, :, :, None].expand(b, t, 3, -1, WINDOW_PX**2)
    rgb = rgb.reshape(b * t, 3, -1)
    pixels = frames.view(b * t, 3, -1)
    pixels = pixels.scatter_add(2, flat, alpha * (rgb - pixels.gather(2, flat)))
    return pixels.view(b, t, 3, FRAME_PX, FRAME_PX).clamp(0, 1)


def shot_index(batch: SceneBatch, times_s: Tensor) -> Tensor:
    """Which shot each frame shows: [B, T] seconds -> [B, T] long."""
    started = batch.shot_start_s[:, None, :] <= times_s[..., None]
    return started.sum(-1).clamp(min=1) - 1


def where_things_are(batch: SceneBatch, times_s: Tensor) -> tuple[Tensor, Tensor]:
    """Centres [B, T, K, 2] in pixels and visibility [B, T, K]."""
    start_s, end_s = batch.thing_span_s[:, None].unbind(-1)
    now_s = times_s[..., None]
    age_s = (now_s - start_s).clamp(min=0)
    age_s = torch.minimum(age_s, (end_s - start_s).clamp(min=0))
    xy = batch.thing_xy_px[:, None] + batch.thing_velocity_px_s[:, None] * age_s[..., None]
    return xy, (start_s <= now_s) & (now_s < end_s)


def token_labels(batch: SceneBatch, times_s: Tensor) -> dict[str, Tensor]:
    """What each of the 14 x 14 tokens of a frame shows, each [B, T, 196] long, -100 where
    undefined.

    `color` and `shape` are 0 for background, 1 + id for a thing (undefined where a thing only
    grazes the token or has no name); `surface` is the id of the shot's surface, `zone` that of the
    token's own place; `row` and `column` are those of the nearest thing with a name.
    """
    xy, visible = where_things_are(batch, times_s)
    half = 0.45 * batch.thing_diameter_px[:, None, :, None, None]
    cell = FRAME_PX / GRID
    low = torch.arange(GRID, device=xy.device) * cell
    left = torch.maximum(xy[..., None] - half, low)  # [B, T, K, 2, 14]
    right = torch.minimum(xy[..., None] + half, low + cell)
    overlap = (right - left).clamp(min=0) / cell
    cover = overlap[..., 1, :, None] * overlap[..., 0, None, :] * visible[..., None, None]
    most, which = cover.flatten(-2).max(dim=2)  # [B, T, 196]
    rows = torch.arange(len(xy), device=xy.device)[:, None, None]

    def label(ids: Tensor) -> Tensor:
        value = ids[rows, which] + 1
        value = torch.where(most > 0.12, value, torch.full_like(value, -100))
        return torch.where(most == 0, torch.zeros_like(value), value)

    named = batch.thing_color >= 0
    nameless = torch.full_like(batch.thing_color, -101)
    surface = batch.shot_surface.gather(1, shot_index(batch, times_s))
    across = (low + cell / 2).repeat(GRID)
    down = (low + cell / 2).repeat_interleave(GRID)
    there = (visible & named[:, None])[..., None]
    apart = torch.hypot(xy[..., 0, None] - across, xy[..., 1, None] - down)  # [B, T, K, 196]
    nearest = torch.where(there, apart, torch.full_like(apart, torch.inf)).argmin(dim=2)
    place = (xy / cell).long().clamp(0, GRID - 1)
    undefined = torch.full_like(nearest, -100)
    column, row = (
        torch.where(there.any(dim=2), place[..., i].gather(2, nearest), undefined) for i in (0, 1)
    )
    return {
        "color": label(torch.where(named, batch.thing_color, nameless)),
        "shape": label(torch.where(named, batch.thing_shape, nameless)),
        "surface": surface[..., None].expand_as(most),
        "zone": _zones(across / FRAME_PX, down / FRAME_PX).expand_as(most),
        "row": row,
        "column": column,
    }


def _zones(x: Tensor, y: Tensor) -> Tensor:
    """The id in `world.ZONES` of places in [0, 1], -100 between zones: two [N] -> [N] long."""
    zone = torch.full_like(x, -100, dtype=torch.long)
    middle_x, middle_y = (x - 0.5).abs() < 0.22, (y - 0.5).abs() < 0.22
    zone[(x < 0.3) & middle_y] = 0
    zone[(x > 0.7) & middle_y] = 1
    zone[(y < 0.3) & middle_x] = 2
    zone[(y > 0.7) & middle_x] = 3
    zone[((x - 0.5).abs() < 0.15) & ((y - 0.5).abs() < 0.15)] = 4
    return zone


def _surfaces(batch: SceneBatch) -> Tensor:
    """The background of every shot: [B, S, 3, 224, 224]."""
    value = patterns(
        batch.shot_surface.flatten(),
        batch.shot_scale.flatten(),
        batch.shot_angle_rad.flatten(),
        batch.shot_seed.flatten(),
    )[:, None]
    dark, light = batch.shot_rgb.flatten(0, 1)[..., None, None].unbind(1)
    return torch.lerp(dark, light, value).view(*batch.shot_surface.shape, 3, FRAME_PX, FRAME_PX)


def _coverage(x: Tensor, y: Tensor, radius: Tensor, shape: Tensor) -> Tensor:
    """Soft coverage in [0, 1] from signed distances, about one pixel wide at the edge.

    `x, y` are pixel offsets from the centre, broadcast against `radius` and `shape` ids.
    """
    ax, ay = x.abs(), y.abs()
    r = torch.hypot(x, y)
    angle = torch.atan2(x, -y) * (5 / (2 * torch.pi))
    lobe = (angle - angle.round()).abs() * 2  # 0 at a tip of the star, 1 between two
    circle = r - radius
    square = torch.maximum(ax, ay) - 0.85 * radius
    triangle = torch.maximum(y - 0.75 * radius, 0.88 * ax - 0.44 * y - 0.44 * radius)
    diamond = (ax + 0.72 * ay - 0.8 * radius) * 0.81
    cross = torch.maximum(torch.maximum(ax, ay) - radius, torch.minimum(ax, ay) - 0.3 * radius)
    ring = (r - 0.75 * radius).abs() - 0.25 * radius
    bar = torch.maximum(ax - 1.1 * radius, ay - 0.42 * radius)
    star = (r - radius * (1.15 - 0.72 * lobe)) * 0.7
    blob = (r - 0.75 * radius) * 0.35
    kinds = (circle, square, triangle, diamond, cross, ring, bar, star, blob)
    distance = torch.zeros(torch.broadcast_shapes(x.shape, y.shape, radius.shape), device=x.device)
    for index, kind in enumerate(kinds):
        distance = torch.where(shape == index, kind, distance)
    return torch.clamp(0.5 - distance, 0, 1)
