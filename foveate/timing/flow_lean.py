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

    What no flow step changes is made once: keys and values that layers project of the prefix, those
    of the state, which sees no action, and all that hangs on the flow time alone, which is the same
    in every call. Layers that read the same are one product; sums, norms, rotations and gates are
    one kernel each on CUDA.
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
        expert, first = self._subject.expert, self._shape.first
        cos, sin = self._subject.rotary(keys[0])
        seen = [
            layer.behind(key, value)
            for layer, key, value in zip(self._layers, keys, values, strict=True)
        ]
        if expert.state is not None:
            row = expert.state(state.to(self._when.dtype))[:, None]
            _, seen = self._through(row, 0, (cos[:, :first], sin[:, :first]), seen)
        rotary = (cos[:, first:], sin[:, first:])
        for step in range(self._shape.steps):
            noise = noise - self._velocity(noise, step, rotary, seen).float() / self._shape.steps
        return noise

    def _velocity(self, noisy: Tensor, step: int, rotary: Pair, seen: Sequence[Pair]) -> Tensor:
        expert = self._subject.expert
        x = expert.enter(noisy.to(self._when.dtype))
        if not self._shape.modulated:
            x = expert.time(torch.cat([x, self._when[step].expand_as(x)], -1))
        velocity: Tensor = expert.leave(self._through(x, step, rotary, seen)[0])
        return velocity

    def _through(
        self, x: Tensor, step: int, rotary: Pair, seen: Sequence[Pair]
    ) -> tuple[Tensor, list[Pair]]:
        """x [b, n, d] behind the last norm, and the keys and values that each layer saw: those
        given, and its own of x if it is joint."""
        more: Tensor | None = None
        norms = iter(self._norms)
        grown = []
        for layer, (key, value) in zip(self._layers, seen, strict=True):
            x, h, gate = next(norms)(x, more, step)
            query, key, value = layer.beside(h, rotary, key, value)
            grown.append((key, value))
            x, h, gate = next(norms)(x, gated(layer.attend(query, key, value), gate), step)
            more = gated(layer.widen(h), gate)
        return next(norms)(x, more, step)[1], grown


class _LeanLayer:
    def __init__(self, layer: Any, kernels: Any) -> None:
        self._layer, self._rotate = layer, kernels.rotate
        own = [layer.query, layer.key, layer.value] if layer.joint else [layer.query]
        self._project = one_product(own)
        mlp = layer.mlp
        self._widen = one_product([mlp.gate, mlp.up])
        is_fused = type(mlp.activation) is plain.SILU and kernels is not plain
        self._gate = kernels.silu_gate if is_fused else lambda g, u: mlp.activation(g) * u

    def behind(self, key: Tensor, value: Tensor) -> Pair:
        """What the layer attends to of the prefix."""
        return (key, value) if self._layer.joint else self._layer.projected(key, value)

    def beside(
        self, h: Tensor, rotary: Pair, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(queries of h, keys and values that they attend to), [b, heads, n, d] each."""
        heads = (*h.shape[:2], -1, self._layer.size)
        query, *own = (part.view(heads) for part in self._project(h))
        query, turned = self._rotate(query, own[0] if own else query[:, :, :0], *rotary)
        if own:
            key = torch.cat([key, turned.transpose(1, 2)], 2)
            value = torch.cat([value, own[1].transpose(1, 2)], 2)
        return query.transpose(1, 2), key, value

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        out: Tensor = self._layer.out(seen.transpose(1, 2).flatten(2))
        return out

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
