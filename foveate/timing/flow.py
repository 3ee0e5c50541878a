"""A control step of a flow policy: pictures and words are a prefix, an expert flows over its cache.

Shapes are those of the policies, weights are random. What the time of a step hangs on is there:
all linear layers, norms and attention. Padding masks are not, and actions see each other whole; a
state in front of them does not see them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from policies.vision.tower import states
from stream.data import PatchGrid

from .subjects import Prompt, StepSubject, linear_weights

NOISE_SEED = 2
EPS = 1e-6


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """width, mlp: of the expert; its heads and its activation are those of the prefix. actions: of
    each of the `chunk` steps. state: numbers of the robot's state, one more token in front of the
    actions; 0 = the prefix holds it. crossing: every so many layers are joint, the others only look
    at the prefix, whose keys and values they project anew in each flow step; 1 = all are joint.
    modulated: the flow time scales the norms, instead of being an input beside the actions.
    """

    width: int
    mlp: int
    actions: int = 32
    chunk: int = 50
    steps: int = 10
    state: int = 0
    crossing: int = 1
    modulated: bool = False

    @property
    def first(self) -> int:
        """Tokens in front of the actions."""
        return int(self.state > 0)


class FlowSubject(StepSubject):
    """SigLIP, a projector, a Llama- or Gemma-shaped prefix and the expert.

    shuffle: patches along each side of a square that become one token. The last place of the
    text is the robot's state, where the expert has no token for it. noise: what the flow starts
    from, float32 [1, chunk, a]. state: float32 [1, s], s = 0 where the prefix holds it.
    """

    def __init__(
        self,
        name: str,
        tower: Any,
        shuffle: int,
        text_model: Any,
        text: int,
        expert: ExpertShape,
        cameras: int,
    ) -> None:
        self.name, self.weights = name, "random"
        self._tower, self._shuffle, self.text_model = tower, shuffle, text_model
        vision = tower.config
        side = vision.image_size // vision.patch_size // shuffle
        self._shape = (cameras, 3, vision.image_size, vision.image_size)
        self.grid = PatchGrid(cameras, side, side)
        self.prompt = Prompt(before=1, after=text, decode=0, slots=1, flow_steps=expert.steps)
        self.head = nn.Identity()
        with torch.device(self.device):
            width = int(text_model.config.hidden_size)
            projector = nn.Linear(vision.hidden_size * shuffle**2, width)
            self.expert = _Expert(expert, text_model.config)
        self._projector = projector.to(self.dtype).eval()
        self._lean = states(tower)
        self.expert.to(self.dtype).eval()
        generator = torch.Generator().manual_seed(NOISE_SEED)
        noise = torch.randn(1, expert.chunk, expert.actions, generator=generator)
        self.noise = noise.to(self.device)
        self.state = torch.randn(1, expert.state, generator=generator).to(self.device)

    def pixels(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self._shape, generator=generator).to(self.device, self.dtype)

    def encode(self, pixels: Tensor, scored: bool) -> tuple[Tensor, ...]:
        return self._projected(self._lean(pixels))

    def encode_stock(self, pixels: Tensor, scored: bool) -> tuple[Tensor, ...]:
        return self._projected(self._tower(pixels).last_hidden_state)

    def _projected(self, hidden: Tensor) -> tuple[Tensor, ...]:
        rows, k = self.grid.rows, self._shuffle
        squares = hidden.unflatten(1, (rows, k, rows, k)).transpose(2, 3)
        return (self._projector(squares.flatten(3).flatten(1, 2).flatten(2)).flatten(0, 1),)

    def actions(
        self, noise: Tensor, state: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> Tensor:
        """All flow steps: float32 [b, chunk, a].

        noise: float32 [b, chunk, a]; state: float32 [b, s]; keys, values: of each layer of the
        prefix, [b, h, n, d], where n may differ from layer to layer. What the expert adds stands
        behind the unpruned prefix.
        """
        expert, rotary = self.expert, self.rotary(keys[0])
        mask = expert.mask(max(key.shape[2] for key in keys))
        for step in range(expert.shape.steps):
            time = torch.full((len(noise),), 1 - step / expert.shape.steps, device=noise.device)
            velocity = expert(noise, state, time, rotary, mask, keys, values)
            noise = noise - velocity.float() / expert.shape.steps
        return noise

    def rotary(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the state's place, if it has one, and of the actions', [1, n, head], of
        the type of a tensor."""
        first = self.prompt.before + self.grid.size + self.prompt.after
        added = self.expert.shape.first + self.expert.shape.chunk
        places = first + torch.arange(added, device=like.device)
        cos, sin = self.text_model.rotary_emb(like, places[None])
        return cos, sin

    def action_flops(self, seen: Sequence[int], once: bool = False) -> float:
        """Operations of `actions`. seen: places of the prefix in each layer. once: of what no flow
        step changes, the prefix is projected and the state goes through once, and the rest is known
        before."""
        return self.expert.flops(seen, once)

    def encode_flops(self, layers: Sequence[tuple[int, int]] = ()) -> float:
        vision = self._tower.config
        patches = self.grid.per_frame * self._shuffle**2
        attention = 4.0 * vision.hidden_size * patches * vision.num_hidden_layers
        tower = patches * (2.0 * linear_weights(self._tower) + attention)
        projector = 2.0 * self.grid.per_frame * linear_weights(self._projector)
        return float(self.grid.frames * (tower + projector))


class _Expert(nn.Module):
    """(noisy actions [b, s, a], state, time [b], rotary tables, mask, cache of the prefix) ->
    velocity [b, s, a]"""

    def __init__(self, shape: ExpertShape, prefix: Any) -> None:
        super().__init__()
        self.shape = shape
        self._groups = int(prefix.num_attention_heads) // int(prefix.num_key_value_heads)
        width = shape.width
        self.enter = nn.Linear(shape.actions, width)
        self.state = nn.Linear(shape.state, width) if shape.state else None
        inputs = width if shape.modulated else 2 * width
        self.time = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(
            _ExpertLayer(shape, prefix, joint=i % shape.crossing == 0)
            for i in range(prefix.num_hidden_layers)
        )
        self.norm = _Norm(width, shape.modulated)
        self.leave = nn.Linear(width, shape.actions)

    def forward(
        self,
        noisy: Tensor,
        state: Tensor,
        time: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
    ) -> Tensor:
        x = self.enter(noisy.to(self.enter.weight.dtype))
        when = waves(time, self.shape.width).to(x.dtype)[:, None]
        if self.shape.modulated:
            when = F.silu(self.time(when))
        else:
            x = self.time(torch.cat([x, when.expand_as(x)], -1))
        if self.state is not None:
            x = torch.cat([self.state(state.to(x.dtype))[:, None], x], 1)
        for layer, key, value in zip(self.layers, keys, values, strict=True):
            x = layer(x, when, rotary, mask, key, value)
        velocity: Tensor = self.leave(self.norm(x, when)[0][:, self.shape.first :])
        return velocity

    def mask(self, seen: int) -> Tensor | None:
        """Who may look where: bool [groups * n, seen + n] for the n added tokens, once for each
        query head of a group, behind up to `seen` places; None where all see all."""
        shape = self.shape
        if not shape.first:
            return None
        added = shape.first + shape.chunk
        mask = torch.ones(added, seen + added, dtype=torch.bool, device=self.enter.weight.device)
        mask[: shape.first, seen + shape.first :] = False
        return mask.repeat(self._groups, 1)

    def flops(self, seen: Sequence[int], once: bool) -> float:
        shape, layers = self.shape, cast(Any, self.layers)
        first = 2.0 * linear_weights(self.state) if self.state is not None else 0.0
        acted = projected = modulation = 0.0
        for layer, places in zip(layers, seen, strict=True):
            added = shape.first + shape.chunk
            acted += layer.flops(shape.chunk, places, added)
            first += layer.flops(shape.first, places, shape.first if once else added)
            if not layer.joint:
                projected += 2.0 * places * sum(map(linear_weights, (layer.key, layer.value)))
            modulation += 2.0 * sum(map(linear_weights, layer.norms))
        modulation += 2.0 * linear_weights(self.norm)
        acted += 2.0 * shape.chunk * (linear_weights(self.enter) + linear_weights(self.leave))
        time = 2.0 * linear_weights(self.time)
        if shape.modulated:
            modulation += time
        else:
            acted += shape.chunk * time
        if once:
            return float(shape.steps * acted + projected + first)
        return float(shape.steps * (acted + projected + first + modulation))


class _ExpertLayer(nn.Module):
    def __init__(self, shape: ExpertShape, prefix: Any, joint: bool) -> None:
        super().__init__()
        self.joint, self.size = joint, int(prefix.head_dim)
        width, held = shape.width, int(prefix.num_key_value_heads) * self.size
        inside = int(prefix.num_attention_heads) * self.size
        self.query = nn.Linear(width, inside, bias=False)
        self.key, self.value = (
            nn.Linear(width if joint else held, held, bias=False) for _ in range(2)
        )
        self.out = nn.Linear(inside, width, bias=False)
        self.mlp = _Gated(width, shape.mlp, ACT2FN[prefix.hidden_act])
        self.norms = nn.ModuleList(_Norm(width, shape.modulated) for _ in range(2))

    def forward(
        self,
        x: Tensor,
        when: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        h, gate = self.norms[0](x, when)
        query = self.query(h).unflatten(-1, (-1, self.size)).transpose(1, 2)
        if self.joint:
            own, added = (self._heads(p, h) for p in (self.key, self.value))
            query, own = apply_rotary_pos_emb(query, own, *rotary)
            key, value = torch.cat([key, own], 2), torch.cat([value, added], 2)
        else:
            query, _ = apply_rotary_pos_emb(query, query, *rotary)
            key, value = self.projected(key, value)
        b, _, rows, size = query.shape
        groups = query.reshape(b, key.shape[1], -1, size)
        mask = mask[:, -key.shape[2] :] if self.joint and mask is not None else None
        seen = F.scaled_dot_product_attention(groups, key, value, attn_mask=mask)
        seen = seen.reshape(b, -1, rows, size)
        x = x + gate * self.out(seen.transpose(1, 2).flatten(2))
        h, gate = self.norms[1](x, when)
        moved: Tensor = x + gate * self.mlp(h)
        return moved

    def flops(self, rows: int, places: int, added: int) -> float:
        """Of `rows` tokens that look at `places` of the prefix, and at `added` others if joint."""
        looked = places + added * self.joint
        own = [self.query, self.out, self.mlp, *([self.key, self.value] if self.joint else [])]
        return 2.0 * rows * (sum(map(linear_weights, own)) + 2.0 * self.out.in_features * looked)

    def projected(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The prefix's keys and values as a layer that is not joint sees them, [b, h, n, d]."""
        key, value = (held.transpose(1, 2).flatten(2) for held in (key, value))
        return self._heads(self.key, key), self._heads(self.value, value)

    def _heads(self, project: nn.Module, x: Tensor) -> Tensor:
        heads: Tensor = project(x).unflatten(-1, (-1, self.size)).transpose(1, 2)
        return heads


class _Gated(nn.Module):
    def __init__(self, width: int, inside: int, activation: nn.Module) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, inside, bias=False) for _ in range(2))
        self.down = nn.Linear(inside, width, bias=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.activation(self.gate(x)) * self.up(x))
        return out


class _Norm(nn.Module):
    """(normed x, gate of the branch); both depend on the flow time if modulated."""

    def __init__(self, width: int, modulated: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.modulation = nn.Linear(width, 3 * width) if modulated else None

    def forward(self, x: Tensor, when: Tensor) -> tuple[Tensor, Tensor | float]:
        x = F.rms_norm(x, self.weight.shape, self.weight, eps=EPS)
        if self.modulation is None:
            return x, 1.0
        scale, shift, gate = self.modulation(when).chunk(3, -1)
        return x * (1 + scale) + shift, gate


def waves(time: Tensor, width: int) -> Tensor:
    """Sines and cosines of a time [b] at periods of 0.004 to 4: float32 [b, width]."""
    share = torch.linspace(0, 1, width // 2, device=time.device)
    angle = time[:, None] * 2 * math.pi / (0.004 * 1000**share)
    return torch.cat([angle.sin(), angle.cos()], -1)
