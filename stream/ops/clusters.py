"""Density-peak clustering over k nearest neighbours (DPC-KNN), batched over ragged groups."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .built import built
from .merges import MergeRule, cluster_weights


def density_peak_score(
    distance: Tensor,
    neighbours: Tensor,
    valid: Tensor | None = None,
    noise: Tensor | None = None,
    boost: Tensor | None = None,
    most: int | None = None,
) -> Tensor:
    """rho * delta (* boost) of every point, float32 [b, n]; -inf outside `valid`.

    rho = exp(-mean squared distance to the `neighbours` nearest points, itself included);
    delta = distance to the nearest denser point, or the largest distance where none is denser.

    distance: [b, n, n]; neighbours: long [b]; valid: bool [b, n]; noise: [b, n] added to rho;
    boost: float32 [b, n].
    most: the largest of `neighbours`; without it the device is asked.
    Source: HoliTom (arXiv 2505.21334), clustering of static tokens.
    """
    n = distance.shape[-1]
    if valid is None:
        valid = torch.ones(distance.shape[:2], dtype=torch.bool, device=distance.device)
    if most is None:
        most = int(neighbours.max())
    if noise is None and (kernels := kernels_for(distance)):
        scored: Tensor = kernels.density_peak_score(distance, neighbours, valid, boost, most)
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
    score = rho * delta if boost is None else rho * delta * boost
    return score.masked_fill(~valid, -torch.inf)


def assign(distance: Tensor, centre: Tensor) -> Tensor:
    """The nearest centre of every point, long [b, n], counted through all groups: b * n places.

    distance: [b, n, n]; centre: bool [b, n]. Ties go to the lower index; a centre is its own.
    """
    if kernels := kernels_for(distance):
        nearest: Tensor = kernels.assign(distance, centre)
        return nearest
    to_centre = distance.masked_fill(~centre[:, None, :], torch.inf)
    owner = to_centre.argmin(-1)
    b, n = owner.shape
    own = torch.arange(b * n, device=owner.device).view(b, n)
    return torch.where(centre, own, owner + own[:, :1])


def weights(owner: Tensor, times: Tensor, rule: MergeRule, beta: float) -> Tensor:
    """What each of the tokens that a point stands for gives to the point's cluster, float32 [b, n].

    owner: long [b, n], from `assign`; times: long [b, n], tokens of each point, 0 for no point.
    """
    if kernels := kernels_for(owner):
        given: Tensor = kernels.weights(owner, times, rule == "mean", beta)
        return given
    own = torch.arange(owner.numel(), device=owner.device).view_as(owner)
    owner = torch.where(times > 0, owner, own)
    return cluster_weights(owner.view(-1), rule, beta).view_as(owner) / times.clamp_min(1)


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
        some = valid.long()
        clusters_cuda.density_peak_score(distance, some[:, 0], valid, None, 1)
        clusters_cuda.weights(clusters_cuda.assign(distance, valid), some, False, 0.5)
        return clusters_cuda

    return built(run, "Clusters are found in several launches")
