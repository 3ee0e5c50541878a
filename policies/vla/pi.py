"""What lerobot's pi0 and pi05 share: PaliGemma beside a Gemma expert, both run layer by layer.

The flow steps work on a clone of the prefix's cache, so nothing leaks from one into the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..probes import Attention
from .flow import FlowPruning, bound, with_globals
from .flow_family import FlowFamily


class PiFamily(FlowFamily):
    pictures: ClassVar[str] = "_preprocess_images"

    def __init__(self, policy: Any) -> None:
        super().__init__(policy)
        self.towers: Any = self.model.paligemma_with_expert
        self._prefix: Any = self.towers.paligemma.model.language_model
        self._expert: Any = self.towers.gemma_expert.model

    @property
    def depth(self) -> int:
        return len(self._prefix.layers)

    @property
    def side(self) -> int:
        patch = self.towers.paligemma.config.vision_config.patch_size
        return int(self.policy.config.image_resolution[0] // patch)

    @property
    def flow_steps(self) -> int:
        return int(self.policy.config.num_inference_steps)

    def attention(self, layer: int, hidden: Tensor, positions: Tensor, mask: Tensor) -> Attention:
        from transformers.models.gemma.modeling_gemma import apply_rotary_pos_emb

        block = self._prefix.layers[layer]
        own = block.self_attn
        x, _ = block.input_layernorm(hidden)
        query, key = (
            project(x).unflatten(-1, (-1, own.head_dim)).transpose(1, 2)
            for project in (own.q_proj, own.k_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *self._prefix.rotary_emb(x, positions))
        return Attention(query, key, own.scaling, mask, causal=False)

    @contextmanager
    def intercept(self, pruning: FlowPruning) -> Iterator[None]:
        with ExitStack() as stack:
            for layer, block in enumerate(self._prefix.layers):
                hook = block.register_forward_pre_hook(
                    _prefix_hook(pruning, layer), with_kwargs=True
                )
                stack.callback(hook.remove)
            for layer, block in enumerate(self._expert.layers):
                hook = block.register_forward_pre_hook(
                    _expert_hook(pruning, layer), with_kwargs=True
                )
                stack.callback(hook.remove)
                if layer in pruning.action_layers:
                    look = _look_hook(pruning, layer, self.policy.config.chunk_size)
                    stack.callback(block.self_attn.register_forward_hook(look).remove)
            yield

    @contextmanager
    def capturable(self) -> Iterator[None]:
        """Each flow step begins with a copy of the cache, whose tensors no layer writes to."""
        uncopied = partial(with_globals, clone_past_key_values=_of_the_same_tensors)
        with bound(self.model, "denoise_step", uncopied):
            yield

    def words(self, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS

        return batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK]

    def embed(
        self, pictures: Sequence[Tensor], masks: Sequence[Tensor], *words: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        embeds, padding, blocks = self.model.embed_prefix(pictures, masks, *words)
        return embeds, padding, blocks

    def entering(
        self, embeds: Tensor, padding: Tensor, blocks: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d

        mask = prepare_attention_masks_4d(make_att_2d_masks(padding, blocks))
        weight = self._prefix.layers[0].self_attn.q_proj.weight
        hidden = embeds.to(weight.dtype) if weight.dtype == torch.bfloat16 else embeds
        return hidden, padding.cumsum(1) - 1, mask

    def layers(
        self, which: range, hidden: Tensor, positions: Tensor, mask: Tensor, cache: Any
    ) -> Iterator[Tensor]:
        self._prefix.config._attn_implementation = "eager"
        rotary = self._prefix.rotary_emb(hidden, positions)
        for layer in which:
            hidden = self._prefix.layers[layer](
                hidden,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                position_embeddings=rotary,
            )
            yield hidden

    def prefill(self, embeds: Tensor, padding: Tensor, blocks: Tensor) -> Any:
        hidden, positions, mask = self.entering(embeds, padding, blocks)
        self._prefix.config._attn_implementation = "eager"
        _, cache = self.towers.forward(
            attention_mask=mask,
            position_ids=positions,
            past_key_values=None,
            inputs_embeds=[hidden, None],
            use_cache=True,
        )
        return cache


def _of_the_same_tensors(cache: Any) -> Any:
    twin = copy(cache)
    twin.layers = [copy(layer) for layer in cache.layers]
    return twin


def _prefix_hook(pruning: FlowPruning, layer: int) -> Any:
    def enter(
        block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden, positions, mask = pruning.enter(
            layer, args[0], kwargs["position_ids"], kwargs["attention_mask"]
        )
        alive = pruning.alive(layer)
        if alive is not None:
            rotary = tuple(
                torch.take_along_dim(t, alive[..., None], dim=1)
                for t in kwargs["position_embeddings"]
            )
            kwargs = kwargs | {
                "position_ids": positions,
                "attention_mask": mask,
                "position_embeddings": rotary,
            }
        return (hidden, *args[1:]), kwargs

    return enter


def _expert_hook(pruning: FlowPruning, layer: int) -> Any:
    def enter(
        block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask = pruning.enter_step(layer, kwargs["attention_mask"])
        return args, kwargs | {"attention_mask": mask}

    return enter


def _look_hook(pruning: FlowPruning, layer: int, actions: int) -> Any:
    """The policy runs its expert with eager attention, whose weights are there to be read."""

    def look(attention: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        if pruning.looks(layer):
            pruning.look(layer, output[1][:, :, -actions:].detach().float().mean((1, 2)))

    return look
