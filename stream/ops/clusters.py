"""Density-peak clustering over k nearest neighbours (DPC-KNN), batched over ragged groups."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .built import built


def density_peak_score(
    distance: Tensor,
    neighbours: Tensor,
    valid: Tensor | None = None,
    noise: Tensor | None = None,
    most: int | None = None,
) -> Tensor:
    """rho * delta of every point, float32 [b, n]; -inf outside `valid`.

    rho = exp(-mean squared distance to the `neighbours` nearest points, itself included);
    delta = distance to the nearest denser point, or the largest distance where none is denser.

    distance: [b, n, n]; neighbours: long [b]; valid: bool [b, n]; noise: [b, n] added to rho.
    most: the largest of `neighbours`; without it the device is asked.
    Source: HoliTom (arXiv 2505.21334), clustering of static tokens.
    """
    n = distance.shape[-1]
    if valid is None:
        valid = torch.ones(distance.shape[:2], dtype=torch.bool, device=distance.device)
    if most is None:
        most = int(neighbours.max())
    if noise is None and (kernels := kernels_for(distance)):
        scored: Tensor = kernels.density_peak_score(distance, neighbours, valid, most)
        return scored
    pair = valid[:, :, None] & valid[:, None, :]
    apart = ~pair
    near = distance.masked_fill(apart, torch.inf).topk(min(most, n), -1, largest=False).values
    beyond = torch.arange(near.shape[-1], device=distance.device) >= neighbours[:, None, None]
    rho = torch.exp(-near.masked_fill_(beyond, 0.0).square_().sum(-1) / neighbours[:, None])
    if noise is not None:
        rho = rho + noise
    largest = distance.masked_fill(apart, 0.0).amax((-2, -1))[:, None, None]
    denser = (rho[:, None, :] > rho[:, :, None]) & pair
    delta = torch.where(denser, distance, largest).amin(-1)
    return (rho * delta).masked_fill(~valid, -torch.inf)


def assign(distance: Tensor, centre: Tensor) -> Tensor:
    """Index of the nearest centre of every point, long [b, n]; ties go to the lower index.

    distance: [b, n, n]; centre: bool [b, n]. A centre is its own.
    """
    if kernels := kernels_for(distance):
        nearest: Tensor = kernels.assign(distance, centre)
        return nearest
    to_centre = distance.masked_fill(~centre[:, None, :], torch.inf)
    owner = to_centre.argmin(-1)
    own = torch.arange(distance.shape[-1], device=distance.device).expand_as(owner)
    return torch.where(centre, own, owner)


def kernels_for(x: Tensor) -> ModuleType | None:
    """`clusters_cuda`, where it can take groups as large as those of x [b, n, ...]."""
    module = _compiled() if x.is_cuda and x.numel() else None
    return module if module is not None and x.shape[1] <= module.LARGEST else None


@cache
def _compiled() -> ModuleType | None:
    """`clusters_cuda`, once it has run."""

    def run() -> ModuleType:
        from . import clusters_cuda

        pairs = torch.zeros(1, 2, 2, device="cuda")
        valid = pairs[:, 0] == 0
        distance = clusters_cuda.distances(pairs, 2)
        clusters_cuda.density_peak_score(distance, torch.ones_like(valid[:, 0]).long(), valid, 1)
        clusters_cuda.assign(distance, valid)
        return clusters_cuda

    return built(run, "Clusters are found in several launches")
