"""What a lossy 4:2:0 codec does to frames, near enough that real h264 files hold no surprise.

Chroma at half resolution, block transforms with coarse coefficients, a change of exposure a video.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_PX = 8


def degrade(frames: Tensor, generator: torch.Generator) -> Tensor:
    """[B, T, 3, H, W] in [0, 1] -> the same shape, degraded by one random strength a video."""
    b, t = frames.shape[:2]

    def per_video(low: float, high: float) -> Tensor:
        draw = torch.rand(b, generator=generator, device=frames.device) * (high - low) + low
        return draw.repeat_interleave(t).view(-1, 1, 1, 1)

    rgb = frames.flatten(0, 1)
    y, cb, cr = _to_ycc(rgb * per_video(0.88, 1.12) + per_video(-0.04, 0.04))
    step = per_video(0.004, 0.06)
    y = _quantise(y, step)
    chroma = F.avg_pool2d(torch.cat((cb, cr), dim=1), 2)
    chroma = _quantise(chroma.flatten(0, 1)[:, None], step.repeat_interleave(2, dim=0))
    chroma = F.interpolate(chroma.unflatten(0, (b * t, 2))[:, :, 0], scale_factor=2, mode="nearest")
    rgb = _to_rgb(y, chroma[:, :1], chroma[:, 1:]).clamp(0, 1)
    return ((rgb * 255).round() / 255).view(frames.shape)


def _to_ycc(rgb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """BT.601: [N, 3, H, W] -> luma and two chroma planes centred on zero, each [N, 1, H, W]."""
    r, g, b = rgb.split(1, dim=1)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    return y, (b - y) * 0.564, (r - y) * 0.713


def _to_rgb(y: Tensor, cb: Tensor, cr: Tensor) -> Tensor:
    r = y + cr / 0.713
    b = y + cb / 0.564
    return torch.cat((r, (y - 0.299 * r - 0.114 * b) / 0.587, b), dim=1)


def _quantise(plane: Tensor, step: Tensor) -> Tensor:
    """Round the cosine coefficients of every 8 x 8 block: [N, 1, H, W], step [N, 1, 1, 1]."""
    k = torch.arange(BLOCK_PX, device=plane.device, dtype=plane.dtype)
    basis = torch.cos(math.pi / BLOCK_PX * (k[None] + 0.5) * k[:, None]) * (2 / BLOCK_PX) ** 0.5
    basis = torch.cat((basis[:1] / 2**0.5, basis[1:]))
    coarse = step[..., None] * (1 + (k[:, None] + k[None]) / 5)
    n, _, height, width = plane.shape
    blocks = plane.view(n, height // BLOCK_PX, BLOCK_PX, width // BLOCK_PX, BLOCK_PX)
    blocks = blocks.transpose(2, 3)
    spectrum = basis @ blocks @ basis.T
    coarse = coarse.view(n, 1, 1, BLOCK_PX, BLOCK_PX)
    blocks = basis.T @ (torch.round(spectrum / coarse) * coarse) @ basis
    return blocks.transpose(2, 3).reshape(plane.shape)
