"""Many questions behind one visual prefix: the stock forward, computed once for the video.

The sequence is `head | visual tokens, newline | question 0 | question 1 | ...`. The prefix attends
causally to itself; each question attends to the whole prefix and causally to itself. So a
question's hidden states are those of the stock model on that question alone, and a dozen questions
cost little more than one. Positions are real numbers: tokens may lie closer than one apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .modeling import START, Model, vocabulary

HEAD_TOKENS = (START, "user")
Layer = Any  # one of transformers' layers, whose attributes no type checker knows


def vision_tower(model: Model) -> Any:
    tower: Any = model.model.vision_tower
    return getattr(tower, "vision_model", tower)


def vit_attend(layer: Layer, hidden: Tensor) -> Tensor:
    """What attention adds in one SigLIP encoder layer: [N, 784, d] -> [N, 784, d]."""
    q, k, v = vit_qkv(layer, hidden)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    added: Tensor = layer.self_attn.out_proj(mixed)
    return added


def vit_finish(layer: Layer, hidden: Tensor, added: Tensor) -> Tensor:
    """The layer's output, given what its attention adds: both [N, 784, d]."""
    hidden = hidden + added
    out: Tensor = hidden + layer.mlp(layer.layer_norm2(hidden))
    return out


def vit_qkv(layer: Layer, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one layer, each [N, heads, 784, d_head]."""
    normed, attention = layer.layer_norm1(hidden), layer.self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (
        p(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for p in projections
    )
    return q, k, v


def llm_project(layer: Layer, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Rotated queries and keys, and values, of one Qwen2 layer, each [B, heads, S, d_head]."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (
        p(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for p in projections
    )
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def llm_finish(layer: Layer, hidden: Tensor, mixed: Tensor) -> Tensor:
    """The rest of the layer: rows [B, S, d] and mixed values [B, heads, S, d_head] -> [B, S, d]."""
    hidden = hidden + layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
    out: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding: x [B, heads, S, d_head], cos and sin [B, 1, S, d_head] in float32."""
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


@dataclass(frozen=True, slots=True)
class Kernels:
    """The heavy parts of both towers, plain or compiled."""

    attend: Callable[..., Tensor] = vit_attend
    vit_finish: Callable[..., Tensor] = vit_finish
    project: Callable[..., tuple[Tensor, ...]] = llm_project
    finish: Callable[..., Tensor] = llm_finish

    @classmethod
    def compiled(cls) -> Kernels:
        return cls(
            torch.compile(vit_attend, dynamic=False),
            torch.compile(vit_finish, dynamic=False),
            torch.compile(llm_project, dynamic=True),
            torch.compile(llm_finish, dynamic=True),
        )


PLAIN = Kernels()


def patch_states(model: Model, pixels: Tensor, run: Kernels = PLAIN) -> tuple[Tensor, Tensor]:
    """The vision tower's last hidden states, and what the last layer's attention added to them.

    Normalised pixels [N, 3, 224, 224] -> two [N, 784, d].
    """
    tower = vision_tower(model)
    hidden = tower.embeddings(pixels).to(pixels.dtype)
    added = hidden
    for layer in tower.encoder.layers:
        added = run.attend(layer, hidden)
        hidden = run.vit_finish(layer, hidden, added)
    return hidden, added


def received_attention(model: Model, pixels: Tensor) -> Tensor:
    """Mean attention each token receives in the last vision layer: [N, 3, H, W] -> [N, 196]."""
    tower = vision_tower(model)
    hidden = tower.embeddings(pixels)
    for layer in tower.encoder.layers[:-1]:
        hidden = vit_finish(layer, hidden, vit_attend(layer, hidden))
    q, k, _ = vit_qkv(tower.encoder.layers[-1], hidden)
    weights = (q @ k.mT * q.shape[-1] ** -0.5).float().softmax(-1)
    return pool(weights.mean((1, 2))[..., None], 14)[..., 0]


def pool(tokens: Tensor, grid: int) -> Tensor:
    """Average 28 x 28 tokens into grid x grid: [N, 784, d] -> [N, grid**2, d].

    At 14 it equals the stock model's bilinear pooling; other grids stand for other models' token
    counts.
    """
    side = int(tokens.shape[1] ** 0.5)
    planes = tokens.mT.unflatten(-1, (side, side))
    return F.adaptive_avg_pool2d(planes, grid).flatten(2).mT


@dataclass(frozen=True, slots=True)
class VisualTokens:
    """B videos of T frames, as the language model reads them and as the losses judge them."""

    read: Tensor  # [B, T * grid**2, d]
    finest: Tensor  # [B, T * 196, d] the same at grid 14
    attended: Tensor  # [B, T * 196, d_vision] what the last vision layer's attention added


def frame_tokens(
    model: Model, frames: Tensor, grid: int = 14, run: Kernels = PLAIN
) -> VisualTokens:
    """Visual tokens of frames [B, T, 3, 224, 224] in [0, 1]."""
    pixels = (frames.flatten(0, 1) - 0.5) / 0.5
    states, added = patch_states(model, pixels, run)
    projected = model.model.multi_modal_projector(states)
    finest = pool(projected, 14)
    read = finest if grid == 14 else pool(projected, grid)
    shaped = (
        x.unflatten(0, frames.shape[:2]).flatten(1, 2) for x in (read, finest, pool(added, 14))
    )
    return VisualTokens(*shaped)


def visual_positions(frame_scale: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """Positions when frame t's tokens lie `frame_scale[:, t]` apart: [B, T] -> [B, T * n + 1], [B].

    The first holds the visual tokens and the newline, the second where a question starts. With
    every scale at 1 they are the stock positions.
    """
    n = grid * grid
    ends = frame_scale.cumsum(1) * n
    within = torch.arange(n, device=frame_scale.device) * frame_scale[..., None]
    positions = (ends - frame_scale * n)[..., None] + within
    positions = torch.cat((positions.flatten(1), ends[:, -1:]), dim=1) + len(HEAD_TOKENS)
    return positions, positions[:, -1] + 1


def question_states(
    model: Model,
    visual: Tensor,
    positions: Tensor,
    start: Tensor,
    question_ids: Tensor,
    run: Kernels = PLAIN,
) -> Tensor:
    """Last hidden states of every question token, normalised, ready for `lm_head`.

    visual [B, V, d] without the newline, positions [B, V + 1] with it, start [B] the position of a
    question's first token, question_ids [B, Q, L] padded on the right -> [B, Q, L, d].
    """
    llm: Any = model.model.language_model
    b, n_questions, length = question_ids.shape
    ids = vocabulary()
    head = torch.stack([llm.embed_tokens.weight[ids[token]] for token in HEAD_TOKENS])
    head = head.to(visual.dtype).expand(b, -1, -1)
    newline = model.model.image_newline.to(visual.dtype).expand(b, 1, -1)
    asked = llm.embed_tokens(question_ids).to(visual.dtype).flatten(1, 2)
    hidden = torch.cat((head, visual, newline, asked), dim=1)
    n_prefix = hidden.shape[1] - n_questions * length

    head_at = torch.arange(len(HEAD_TOKENS), device=visual.device).expand(b, -1)
    steps = torch.arange(length, device=visual.device).repeat(n_questions)
    where = torch.cat((head_at, positions, start[:, None] + steps), dim=1)
    angles = where.float()[..., None] * llm.rotary_emb.inv_freq.float()
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    cos, sin = angles.cos(), angles.sin()

    block = torch.arange(n_questions * length, device=visual.device)
    same = block[:, None] // length == block // length
    mask = F.pad(same & (block[:, None] >= block), (n_prefix, 0), value=True)
    for layer in llm.layers:
        q, k, v = run.project(layer, hidden, cos, sin)
        mixed = F.scaled_dot_product_attention(q[:, :, n_prefix:], k, v, attn_mask=mask)
        if layer is llm.layers[-1]:
            hidden = hidden[:, n_prefix:]
        else:
            before_q, before_k, before_v = (x[:, :, :n_prefix] for x in (q, k, v))
            seen = F.scaled_dot_product_attention(before_q, before_k, before_v, is_causal=True)
            mixed = torch.cat((seen, mixed), dim=2)
        hidden = run.finish(layer, hidden, mixed)
    states: Tensor = llm.norm(hidden)
    return states.view(b, n_questions, length, -1)
