"""Not computing again what stands still: of most frames only the changed patches are encoded.

A key frame is encoded whole. A frame behind it is encoded at its most changed patches alone: they
attend to the whole picture, whose other keys and values are the key frame's, and every other patch
keeps the key frame's features. So a frame's error is what its unchanged patches would have learned
of the change, and it cannot outlive the next key frame.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from stream.ops import picks

from .siglip import SiglipParts, received, spread


class Layout(NamedTuple):
    """Frames by how they are encoded: long [k] key frames, long [f - k] the others, and long
    [f - k] which of the key frames each of those stands behind."""

    keys: Tensor
    later: Tensor
    behind: Tensor


class SkippingTower:
    """A SigLIP tower over consecutive frames.

    refresh: frames from one key frame to the next, at most. share: patches of a frame that are
    encoded again; a frame of which more has changed becomes a key frame. still: mean absolute
    difference of pixel values up to which a patch counts as unchanged.
    """

    def __init__(
        self, tower: nn.Module, refresh: int = 8, share: float = 0.25, still: float = 0.1
    ) -> None:
        self._parts = SiglipParts(tower)
        self._refresh, self._share, self._still = refresh, share, still
        self.patches, self.depth = self._parts.patches, len(self._parts.layers)
        self._again = max(1, round(share * self.patches))

    def computed(self, layout: Layout) -> int:
        """Patches of all frames that each layer computes."""
        return layout.keys.numel() * self.patches + layout.later.numel() * self._again

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
        parts, device = self._parts, pixels.device
        key, rest, of = layout
        x = parts.embed(pixels)
        f, p, d = x.shape
        again = self._again
        index = picks.top(self._change(pixels[rest], pixels[key[of]]), again)
        keys, later = key.shape[0], rest.shape[0]

        def apart(t: Tensor) -> tuple[Tensor, Tensor]:
            """[tokens, ...] -> [keys, p, ...], [later, again, ...]."""
            one, two = t.split([keys * p, later * again])
            return one.view(keys, p, *t.shape[1:]), two.view(later, again, *t.shape[1:])

        def refreshed(old: Tensor, new: Tensor) -> Tensor:
            """The key frames' [keys, p, ...] with each later frame's new rows in their places."""
            wide = index.view(*index.shape, *(1,) * (new.ndim - 2)).expand_as(new)
            return old[of].scatter(1, wide, new)

        x = torch.cat([x[key].flatten(0, 1), spread(x[rest], index).flatten(0, 1)])
        scores = None
        for number, layer in enumerate(parts.layers):
            q, k, v = (t.transpose(0, 1) for t in parts.heads(layer, x))
            (q1, q2), (k1, k2), (v1, v2) = apart(q), apart(k), apart(v)
            own = [(q1, k1, v1), (q2, refreshed(k1, k2), refreshed(v1, v2))]
            if saliency and number == len(parts.layers) - 1:
                looks = [(q1, k1), (refreshed(q1, q2), own[1][1])]
                scores = [
                    received(layer, query.transpose(1, 2), k.transpose(1, 2))
                    for query, k in looks
                    if query.numel()
                ]
            x1, x2 = (
                parts.attended(layer, x, *(t.transpose(1, 2) for t in seen)) if x.numel() else x
                for x, seen in zip(apart(x), own, strict=True)
            )
            x = parts.mixed(layer, torch.cat([x1.flatten(0, 1), x2.flatten(0, 1)]))
        x1, x2 = apart(x)
        place = torch.cat([key, rest])
        hidden = torch.empty(f, p, d, dtype=x.dtype, device=device)
        hidden[place] = torch.cat([x1, refreshed(x1, x2)])
        if scores is None:
            return (hidden,)
        score = torch.empty(f, p, device=device)
        score[place] = torch.cat(scores)
        return hidden, score

    def _change(self, new: Tensor, old: Tensor) -> Tensor:
        """Mean absolute difference of each patch, float32 [f, p]."""
        side = self._parts.patch_px
        height, width = (n // side * side for n in new.shape[-2:])
        apart = (new - old).abs().float().mean(1)[:, :height, :width]
        patches: Tensor = apart.unflatten(1, (-1, side)).unflatten(3, (-1, side))
        return patches.mean((2, 4)).flatten(1)
