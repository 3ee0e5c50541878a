"""Not computing again what stands still: of most frames only the changed patches are encoded.

A key frame is encoded whole. A frame behind it is encoded at its most changed patches alone: they
attend to the whole picture, whose other keys and values come from the key frame. What stands still
learns of a change elsewhere all the same, smoothly over the picture. So a share of the unchanged
patches, spread evenly, is encoded too, and what moved between the two frames in these probes is
added to the key frame's states around them, in every layer. No error outlives the next key frame.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from stream.ops import picks

from ..graphs.encoder import Sum
from .siglip import SiglipParts, received, spread

PROBE_REACH = 0.6
"""Deviation of a probe's weight over distance, in mean distances between encoded patches."""


class Layout(NamedTuple):
    """Frames by how they are encoded: long [k] key frames, long [f - k] the others, and long
    [f - k] which of the key frames each of those stands behind."""

    keys: Tensor
    later: Tensor
    behind: Tensor


class SkippingTower:
    """A SigLIP tower over consecutive frames.

    refresh: frames from one key frame to the next, at most. share: patches of a frame that are
    encoded again, those that changed and with what is left the probes; a frame of which more has
    changed becomes a key frame. still: mean absolute difference of pixel values up to which a patch
    counts as unchanged.
    """

    def __init__(
        self, tower: nn.Module, refresh: int = 16, share: float = 0.25, still: float = 0.1
    ) -> None:
        self._parts = SiglipParts(tower)
        self._refresh, self._share, self._still = refresh, share, still
        self.patches, self.depth = self._parts.patches, len(self._parts.layers)
        self._again = max(1, round(share * self.patches))
        side, device = round(self.patches**0.5), next(tower.parameters()).device
        self._turn = spread_evenly(side).to(device)
        place = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float().to(device)
        apart = torch.cdist(place, place)
        self._nearness = -((apart / PROBE_REACH).square() * self._again / self.patches) / 2

    def computed(self, layout: Layout) -> int:
        """Patches of all frames that each layer computes."""
        return layout.keys.numel() * self.patches + layout.later.numel() * self._again

    def seen(self, layout: Layout) -> int:
        """Patches that each of them sees in a layer. To correct the keys and values of a later
        frame costs as much as its attention once more, and is counted so."""
        later = layout.later.numel() * self._again
        return round(self.patches * (1 + later / self.computed(layout)))

    def layout(self, pixels: Tensor) -> Layout:
        """Which frames of [f, 3, h, w] to encode whole; asks the device once.

        Their number is rounded up to an eighth of the frames, for fixed shapes: the frames that
        changed most become key frames too.
        """
        frames = pixels.shape[0]
        changed = torch.zeros(self._refresh, frames, device=pixels.device)
        for lag in range(1, min(self._refresh, frames)):
            moved = self._change(pixels[lag:], pixels[:-lag]) > self._still
            changed[lag, lag:] = moved.float().mean(-1)
        share: list[list[float]] = changed.tolist()
        keys, left = [0], []
        for t in range(1, frames):
            lag = t - keys[-1]
            if lag >= self._refresh or share[lag][t] > self._share:
                keys.append(t)
            else:
                left.append((-share[lag][t], t))
        step = max(1, frames // 8)
        keys += [t for _, t in sorted(left)[: -len(keys) % step]]
        keys.sort()
        later = [t for t in range(frames) if t not in keys]
        behind = [sum(k <= t for k in keys) - 1 for t in later]
        return Layout(
            *(torch.tensor(v, dtype=torch.long).to(pixels.device) for v in (keys, later, behind))
        )

    def __call__(
        self, pixels: Tensor, layout: Layout, saliency: bool = False
    ) -> tuple[Tensor, ...]:
        """[f, 3, h, w] -> (hidden states [f, p, d],), and received attention [f, p] if asked."""
        parts, device = self._parts.now(), pixels.device
        key, rest, of = layout
        x = parts.embed(pixels)
        f, p, d = x.shape
        again = self._again
        change = self._change(pixels[rest], pixels[key[of]])
        changed = change > self._still
        index = picks.top(torch.where(changed, 1 + change, -self._turn), again)
        told_by = self._told_by(index, ~changed.gather(1, index)).to(x.dtype)
        keys, later = key.shape[0], rest.shape[0]

        def apart(t: Tensor) -> tuple[Tensor, Tensor]:
            """[tokens, ...] -> [keys, p, ...], [later, again, ...]."""
            one, two = t.split([keys * p, later * again])
            return one.view(keys, p, *t.shape[1:]), two.view(later, again, *t.shape[1:])

        def refreshed(old: Tensor, new: Tensor) -> Tensor:
            """[later, p, ...]: the new rows in their places, the key frame's others corrected."""
            wide = index.view(*index.shape, *(1,) * (new.ndim - 2)).expand_as(new)
            stale = old[of]
            moved = (new - stale.gather(1, wide)).flatten(2)
            return (stale + (told_by @ moved).view_as(stale)).scatter(1, wide, new)

        now = Sum(torch.cat([x[key].flatten(0, 1), spread(x[rest], index).flatten(0, 1)]))
        scores = None
        for number, layer in enumerate(parts.layers):
            x, *heads = layer.heads(now)
            q, k, v = (t.transpose(0, 1) for t in heads)
            (q1, q2), (k1, k2), (v1, v2) = apart(q), apart(k), apart(v)
            own = [(q1, k1, v1), (q2, refreshed(k1, k2), refreshed(v1, v2))]
            if saliency and number == len(parts.layers) - 1:
                looks = [(q1, k1), (refreshed(q1, q2), own[1][1])]
                scores = [
                    received(layer, query.transpose(1, 2), k.transpose(1, 2))
                    for query, k in looks
                    if query.numel()
                ]
            found = [
                layer.attended(*(t.transpose(1, 2) for t in seen)).flatten(0, 1)
                for seen in own
                if seen[0].numel()
            ]
            now = layer.mixed(Sum(x, torch.cat(found)))
        x1, x2 = apart(now.total())
        place = torch.cat([key, rest])
        hidden = torch.empty(f, p, d, dtype=x.dtype, device=device)
        hidden[place] = torch.cat([x1, refreshed(x1, x2)])
        if scores is None:
            return (hidden,)
        score = torch.empty(f, p, device=device)
        score[place] = torch.cat(scores)
        return hidden, score

    def _told_by(self, index: Tensor, probe: Tensor) -> Tensor:
        """Weights [f, p, again] of the probes around each patch; zero where a frame has none.

        index: long [f, again], patches encoded again. probe: bool, which of them stood still.
        """
        near = self._nearness[index].transpose(1, 2)
        weight = near.masked_fill(~probe[:, None], -1e4).softmax(-1)
        return weight * probe[:, None]

    def _change(self, new: Tensor, old: Tensor) -> Tensor:
        """Mean absolute difference of each patch, float32 [f, p]."""
        side = self._parts.patch_px
        height, width = (n // side * side for n in new.shape[-2:])
        apart = (new - old).abs().mean(1, dtype=torch.float32)[:, :height, :width]
        patches: Tensor = apart.unflatten(1, (-1, side)).unflatten(3, (-1, side))
        return patches.mean((2, 4)).flatten(1)


def spread_evenly(side: int) -> Tensor:
    """The turn of each place of a square grid, float32 [side * side] in [0, 1): the first few are
    spread evenly over it, for every number of them. Source: Bayer's matrix of ordered dithering."""
    turn = torch.zeros(1, 1)
    while len(turn) < side:
        turn = 4 * turn
        turn = torch.cat([torch.cat([turn, turn + 2], 1), torch.cat([turn + 3, turn + 1], 1)])
    return (turn / turn.numel())[:side, :side].flatten()
