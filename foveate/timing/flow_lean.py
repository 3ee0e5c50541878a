"""The expert of a flow policy in fewer kernels, for arms that may change how it is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from policies.graphs import layer as plain
from policies.graphs.joined import one_product

from .flow import EPS, FlowSubject, waves

Held = Sequence[Tensor]
Pair = tuple[Tensor, Tensor]


class LeanExpert:
    """Says what `FlowSubject.actions` says, up to rounding.

    What no flow step changes is made once: keys and values that layers project of the prefix; those
    of the state, which sees no action and so goes through the layers with the first step alone; all
    that hangs on the flow time, which is the same in every call. Layers that read the same are one
    product; sums, norms, rotations and gates are one kernel each on CUDA.
    """

    @torch.inference_mode()
    def __init__(self, subject: FlowSubject) -> None:
        self._subject, expert = subject, subject.expert
        shape = self._shape = expert.shape
        weight = expert.enter.weight
        fused = plain.compiled() if weight.is_cuda else None
        kernels: Any = fused or plain
        layers: Any = expert.layers
        self._layers = [_LeanLayer(layer, kernels) for layer in layers]
        times = [1 - step / shape.steps for step in range(shape.steps)]
        when = waves(torch.tensor(times, device=weight.device), shape.width).to(weight.dtype)
        self._when = F.silu(expert.time(when)) if shape.modulated else when
        norms: Any = [*(norm for layer in layers for norm in layer.norms), expert.norm]
        self._norms = [_LeanNorm(norm, self._when, kernels) for norm in norms]

    def __call__(self, noise: Tensor, state: Tensor, keys: Held, values: Held) -> Tensor:
        """See `FlowSubject.actions`."""
        expert, shape = self._subject.expert, self._shape
        tables = self._subject.rotary(keys[0])
        seen = [
            layer.behind(key, value)
            for layer, key, value in zip(self._layers, keys, values, strict=True)
        ]
        for step in range(shape.steps):
            x = expert.enter(noise.to(self._when.dtype))
            if not shape.modulated:
                x = expert.time(torch.cat([x, self._when[step].expand_as(x)], -1))
            if step == 0 and expert.state is not None:
                x = torch.cat([expert.state(state.to(x.dtype))[:, None], x], 1)
            x, seen = self._through(x, step, tables, seen)
            noise = noise - expert.leave(x).float() / shape.steps
        return noise

    def _through(
        self, x: Tensor, step: int, tables: Pair, seen: Sequence[Pair]
    ) -> tuple[Tensor, list[Pair]]:
        """(the actions behind the last norm [b, chunk, d], what the next ones see in each layer)

        x: [b, n, d], the actions, and in front of them what stays for the next ones to see.
        """
        cos, sin = (table[:, -x.shape[1] :] for table in tables)
        first = x.shape[1] - self._shape.chunk
        more: Tensor | None = None
        norms = iter(self._norms)
        stays = []
        for layer, known in zip(self._layers, seen, strict=True):
            x, h, gate = next(norms)(x, more, step)
            read, kept = layer.attend(h, (cos, sin), known, first)
            stays.append(kept)
            x, h, gate = next(norms)(x, gated(read, gate), step)
            more = gated(layer.widen(h), gate)
        return next(norms)(x, more, step)[1][:, first:], stays


class _LeanLayer:
    def __init__(self, layer: Any, kernels: Any) -> None:
        self._layer, self._rotate = layer, kernels.rotate
        own = [layer.query, layer.key, layer.value] if layer.joint else [layer.query]
        self._project = one_product(own)
        mlp = layer.mlp
        self._widen = one_product([mlp.gate, mlp.up])
        self._gate = plain.gate_of(mlp.activation, kernels is not plain)

    def behind(self, key: Tensor, value: Tensor) -> Pair:
        """What the layer attends to of the prefix."""
        return (key, value) if self._layer.joint else self._layer.projected(key, value)

    def attend(self, h: Tensor, rotary: Pair, known: Pair, first: int) -> tuple[Tensor, Pair]:
        """(what h [b, n, d] makes of `known` keys and values and its own, and these but for those
        of the actions). The first rows of h, which are no actions, see none of them."""
        heads = (*h.shape[:2], -1, self._layer.size)
        query, *own = (part.view(heads) for part in self._project(h))
        query, turned = self._rotate(query, own[0] if own else query[:, :, :0], *rotary)
        query, (key, value), kept = query.transpose(1, 2), known, known
        if own:
            key = torch.cat([key, turned.transpose(1, 2)], 2)
            value = torch.cat([value, own[1].transpose(1, 2)], 2)
            stop = key.shape[2] - h.shape[1] + first
            kept = key[:, :, :stop], value[:, :, :stop]
        seen = looked(query[:, :, first:], key, value)
        if first:
            seen = torch.cat([looked(query[:, :, :first], *kept), seen], 2)
        out: Tensor = self._layer.out(seen.transpose(1, 2).flatten(2))
        return out, kept

    def widen(self, h: Tensor) -> Tensor:
        down: Tensor = self._layer.mlp.down(self._gate(*self._widen(h)))
        return down


class _LeanNorm:
    """(x, what is added to it, flow step) -> (their sum, it normed, gate of the branch)

    when: [steps, d], what the norm is modulated by.
    """

    def __init__(self, norm: Any, when: Tensor, kernels: Any) -> None:
        self._add_norm = kernels.add_norm
        self._weights, self._shifts, self._gates = [norm.weight] * len(when), None, None
        if norm.modulation is not None:
            scale, self._shifts, self._gates = norm.modulation(when).chunk(3, -1)
            self._weights = list(norm.weight * (1 + scale))

    def __call__(
        self, x: Tensor, more: Tensor | None, step: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        weight = self._weights[step]
        if more is None:
            normed = F.rms_norm(x, weight.shape, weight, EPS)
        else:
            x, normed = self._add_norm(x, more, weight, EPS)
        if self._shifts is None or self._gates is None:
            return x, normed, None
        return x, normed + self._shifts[step], self._gates[step]


def gated(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else x * gate


def looked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
