"""The static surfaces: six procedural patterns, drawn from a shot's seed, scale and angle."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .world import FRAME_PX


def lattice(seed: Tensor, rows: int, cols: int) -> Tensor:
    """Uniform numbers in [0, 1) from an integer hash: seeds [M] -> [M, rows, cols]."""
    cell = torch.arange(rows * cols, device=seed.device)
    mixed = (seed[:, None] * 7919 + cell * 104729 + rows * 613) & 0x7FFFFFFF
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39), (15, 0x1B56C4E9)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & 0x7FFFFFFF
    return (mixed.float() / 2**31).view(-1, rows, cols)


def noise(seed: Tensor, rows: int, cols: int) -> Tensor:
    """Smooth noise with `rows` x `cols` bumps: [M] -> [M, 224, 224], values in [0, 1)."""
    return F.interpolate(
        lattice(seed, rows, cols)[:, None],
        size=(FRAME_PX, FRAME_PX),
        mode="bilinear",
        align_corners=True,
    )[:, 0]


def patterns(surface: Tensor, scale: Tensor, angle_rad: Tensor, seed: Tensor) -> Tensor:
    """Pattern values in [0, 1] of M shots: four [M] tensors -> [M, 224, 224].

    `surface` indexes `world.SURFACES`. All six are computed and one is selected.
    """
    px = torch.arange(FRAME_PX, device=seed.device, dtype=torch.float32)
    y, x = px[:, None], px[None, :]
    c, s = torch.cos(angle_rad)[:, None, None], torch.sin(angle_rad)[:, None, None]
    size = scale[:, None, None]
    phase = lattice(seed, 1, 2) * 64
    u = (c * x + s * y) / size + phase[..., 0:1]
    v = (c * y - s * x) / size + phase[..., 1:2]
    fine, coarse = noise(seed + 1, 112, 112), noise(seed + 2, 7, 7)

    sand = 0.65 * fine + 0.35 * coarse
    stretched = noise(seed + 3, 48, 4)
    rings = 0.5 + 0.5 * torch.sin(2 * math.pi * (v / 20 + 1.5 * noise(seed + 4, 5, 3)))
    wood = 0.6 * rings + 0.4 * stretched
    row = torch.floor(v / 20)
    along = u / 40 + 0.5 * (row % 2)
    mortar = ((v / 20) % 1 < 0.14) | (along % 1 < 0.07)
    tint = torch.frac(torch.abs(torch.sin(row * 12.9898 + torch.floor(along) * 78.233)) * 43.7)
    brick = torch.where(mortar, torch.ones_like(tint), 0.1 + 0.35 * tint + 0.15 * fine)
    checker = (torch.floor(u / 26) + torch.floor(v / 26)) % 2
    tile = 0.1 + 0.65 * checker + 0.2 * coarse
    marble = torch.abs(torch.sin((u + v) / 34 + 6 * coarse + 2 * noise(seed + 5, 18, 18))) ** 0.6
    cloth = 0.5 + 0.25 * torch.sin(2 * math.pi * u / 8) + 0.25 * torch.sin(2 * math.pi * v / 8)

    stacked = torch.stack((sand, wood, brick, tile, marble, cloth), dim=1)
    return stacked[torch.arange(len(surface), device=surface.device), surface]
