"""Greedy answers in captured steps: what transformers' `generate` runs in place of its own loop.

`generate` still reads the model's settings: the end tokens, a penalty on repetition and the like
come from it and are applied to every step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from stream.reducers.base import Reducer

from ..hooks import ReductionHooks
from ..kvcache import reorder_end
from ..prefill import Prefill, VideoSpan
from .buckets import TEXT_STEP, WIDTH_STEP, Section, round_up, sections, visual_tokens
from .cache import place_bytes
from .capture import GraphPool
from .continuation import Widths, rows_of, sections_of
from .footing import Footing
from .kept import Kept, weakly
from .staged import Prefilled, StagedDecoder

KEPT, KEPT_BYTES = 16, 1_000_000_000
"""Shapes of prompts whose programs and KV buffers are kept, and what these buffers may take."""

PREFILLED = 2048
"""Places of a batch of prompts that are prefilled in fixed shapes at most. The kernels of more
places are longer than it takes to launch them, and graphs of them hold more memory."""

Listener = Callable[[Sequence[int]], bool]
"""The first answer's token ids so far -> whether to stop."""


class Progress(StoppingCriteria):
    """Notes when the first token was ready, and asks the listener, if there is one, to go on."""

    def __init__(self, listener: Listener | None) -> None:
        self._listener = listener
        self.at_s: float | None = None

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        ids = [] if self._listener is None else input_ids[0].tolist()
        return torch.full((input_ids.shape[0],), self.stop(ids), device=input_ids.device)

    def stop(self, token_ids: Sequence[int]) -> bool:
        if self.at_s is None:
            self.at_s = time.perf_counter()
        return self._listener is not None and self._listener(token_ids)


class GreedySteps:
    """Decodes behind prompts of one model; programs and KV buffers of KEPT shapes of prompts stay,
    the longest unused goes. For one thread at a time.

    A shape is the number of sequences and, for each run of layers that hold equally many tokens,
    that number and the longest answer, rounded up. The first answer of a shape is launched as it
    stands; the second one captures what had run before, at the cost of about three steps on CUDA.
    """

    def __init__(self, model: Any, text_model: PreTrainedModel) -> None:
        self._model, self._text_model = model, text_model
        self._footing = Footing(lambda: (text_model, model.get_output_embeddings()))
        self._behind: Kept[tuple[int, ...], StagedDecoder] = Kept(KEPT, KEPT_BYTES)

    @classmethod
    def of(cls, model: Any, text_model: PreTrainedModel) -> Self | None:
        """None where a layer forgets what is far back: that has no fixed shape here."""
        kinds = set(getattr(text_model.config, "layer_types", None) or ["full_attention"])
        whole = kinds == {"full_attention"}
        return cls(model, text_model) if whole else None

    def ready(self) -> bool:
        """Whether the next answer can be decoded here; ask before each one.

        Not where the model lies on several devices, or has hooks that would not run. What stands on
        an older state of the model goes.
        """
        if not self._footing.holds():
            self._behind.clear()
            self._footing.note()
        return self._footing.is_plain

    def decode(
        self,
        model: Any,
        input_ids: Any,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        progress: Progress,
        hooks: ReductionHooks,
        behind: int,
        **inputs: Any,
    ) -> GenerateDecoderOnlyOutput:
        """For `custom_generate`, with the last three bound; `generate` gives the others.

        behind: places of the prompt behind its video; the positions of the real ones among them
        follow each other. The cache is empty, or holds all that comes before. hooks: attached; they
        are detached, and note what became of the videos that they expect.
        """
        pad, new = int(generation_config.pad_token_id), int(generation_config.max_new_tokens or 0)
        steps, widths, said = self._begin(model, hooks, behind, new, **inputs)
        going = said.new_ones(len(said), dtype=torch.bool)
        logits: list[Any] = []
        first_row: list[int] = []
        with steps:
            while True:
                logits.append(said[:, -1].to(torch.float32, copy=True))
                scores = logits_processor(input_ids, logits[-1])
                token = torch.where(going, scores.argmax(-1), pad)
                input_ids = torch.cat([input_ids, token[:, None]], 1)
                going = going & ~stopping_criteria(input_ids, scores)
                first, *any_going = torch.cat([token[:1], going]).tolist()
                first_row.append(first)
                if progress.stop(first_row) or not any(any_going):
                    return GenerateDecoderOnlyOutput(sequences=input_ids, logits=(*logits,))
                steps.token.copy_(token[:, None])
                said = steps.step(widths)

    def _begin(
        self,
        model: Any,
        hooks: ReductionHooks,
        behind: int,
        new: int,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: DynamicCache,
        **rest: Any,
    ) -> tuple[StagedDecoder, Widths, Tensor]:
        """What goes on behind the prompt, for `new` tokens, and the logits at its end [b, 1, v]."""
        cache, end = past_key_values, slice(-behind, None)
        position = _rotary(position_ids)
        order = attention_mask[:, end].argsort(dim=-1, descending=True, stable=True)
        lengths = attention_mask[:, end].sum(-1)
        if cache.get_seq_length() > 0:
            hooks.detach()
            text = F.pad(rows_of(inputs_embeds[:, end], order), (0, 0, 0, -behind % TEXT_STEP))
            first = order[:, :1].expand(*position.shape[:-1], 1)
            widths, steps = self._behind_cache(cache, text.shape[1] + new)
            steps.adopt(cache, position[..., end].gather(-1, first))
            return steps, widths, steps.extend(widths, text, lengths)
        if inputs_embeds[..., 0].numel() <= PREFILLED:
            before = inputs_embeds.shape[1] - behind
            whole = torch.arange(before, device=order.device).expand(len(order), -1)
            places = torch.cat([whole, before + order], 1)
            rows, stages = hooks.hand_over(len(order))
            widths, made, state = self._prefilled(
                rows or [[] for _ in order],
                stages,
                rows_of(inputs_embeds, places),
                position.gather(-1, places.expand_as(position)),
                behind,
                new,
                behind - lengths,
            )
            if rows:
                hooks.note(state)
            made.decoder.resume(made)
            return made.decoder, widths, made.decoder.said(made)
        said = model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        hooks.detach()
        if len(order) > 1:
            reorder_end(cache, order)
        widths, steps = self._behind_cache(cache, new)
        steps.adopt(cache, position[..., -1:] + 1, padding=behind - lengths)
        return steps, widths, said

    def prefix(self, embeds: Tensor, position_ids: Tensor) -> DynamicCache | None:
        """KV cache of what a prompt begins with; None where that is too long for fixed shapes.

        embeds: [1, n, d]; position_ids: long [..., 1, n].
        """
        if embeds.shape[1] > PREFILLED:
            return None
        _, made, _ = self._prefilled([[]], (), embeds, _rotary(position_ids), 0, 0)
        return made.decoder.taken(made)

    def _prefilled(
        self,
        rows: list[list[VideoSpan]],
        stages: Sequence[Reducer],
        embeds: Tensor,
        position: Tensor,
        behind: int,
        new: int,
        padding: Tensor | None = None,
    ) -> tuple[Widths, Prefilled, Prefill]:
        """Prompts [b, n, d], with room for `new` places behind them: key widths of their sections,
        where they are, and what became of their videos. behind: places behind the last video."""
        b, n, _ = embeds.shape
        more = -n % TEXT_STEP
        parts = sections(stages, int(self._text_model.config.num_hidden_layers))
        of_videos = [visual_tokens(parts, span.plan.k, span.budget) for span in rows[0]]
        visual = [sum(counts) for counts in zip(*of_videos, strict=True)] or [0]
        held = [n - visual[0] + left for left in visual]
        widths, steps = self._shape(
            tuple(Section(part.first, part.stop) for part in parts),
            tuple(round_up(length + max(new, more), WIDTH_STEP) for length in held),
            b,
            n + more,
        )
        made, state = steps.prefill(
            stages,
            rows,
            F.pad(embeds, (0, 0, 0, more)),
            F.pad(position, (0, more)),
            n,
            n - behind,
            padding,
        )
        return widths, made, state

    def _behind_cache(self, cache: DynamicCache, new: int) -> tuple[Widths, StagedDecoder]:
        """With room for `new` places behind a cache; key widths of its sections."""
        parts, layers = sections_of(cache), list[Any](cache.layers)
        held = [layers[part.first].keys.shape for part in parts]
        widths = tuple(round_up(shape[2] + new, WIDTH_STEP) for shape in held)
        return self._shape(tuple(parts), widths, held[0][0], 0)

    def _shape(
        self, parts: tuple[Section, ...], widths: Widths, batch: int, prefilled: int
    ) -> tuple[Widths, StagedDecoder]:
        """What goes on behind prompts of one shape. prefilled: places of those that begin in it."""
        shape = (batch, prefilled, *(part.stop for part in parts), *widths)
        again = shape in self._behind
        places = batch * sum(n * len(part.layers) for n, part in zip(widths, parts, strict=True))
        size = places * place_bytes(self._text_model)

        def made() -> StagedDecoder:
            head = self._model.get_output_embeddings()
            device, spare = next(head.parameters()).device, weakly(self._behind.spare)
            pool = GraphPool(device, spare=spare, patience=1)
            behind = StagedDecoder(self._text_model, head, parts, widths, pool, batch=batch)
            self._footing.note()  # weights may have moved together
            return behind

        steps = self._behind.get(shape, made, size)
        steps.pool.open = again
        return widths, steps


def _rotary(position_ids: Tensor) -> Tensor:
    """Without the first of four axes, which is no rotary one."""
    return position_ids[1:] if position_ids.shape[:-2] == (4,) else position_ids
