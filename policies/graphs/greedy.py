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

from ..hooks import ReductionHooks
from ..kvcache import reorder_end
from .buckets import TEXT_STEP, WIDTH_STEP, round_up
from .capture import GraphPool
from .continuation import Continuation, Widths, rows_of, sections_of
from .footing import Footing
from .kept import Kept

KEPT, KEPT_BYTES = 16, 1_000_000_000
"""Shapes of prompts whose programs and KV buffers are kept, and what these buffers may take."""

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
    stands; the second one captures, at the cost of about three steps on CUDA.
    """

    def __init__(self, model: Any, text_model: PreTrainedModel) -> None:
        self._model, self._text_model = model, text_model
        self._footing = Footing(lambda: (text_model, model.get_output_embeddings()))
        self._behind: Kept[tuple[int, ...], Continuation] = Kept(KEPT, KEPT_BYTES)

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
        see the prefill and are detached behind it.
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
    ) -> tuple[Continuation, Widths, Tensor]:
        """What goes on behind the prompt, for `new` tokens, and the logits at its end [b, 1, v]."""
        cache, end = past_key_values, slice(-behind, None)
        four = position_ids.shape[:-2] == (4,)  # the first of them is no rotary one
        position = position_ids[1:] if four else position_ids
        order = attention_mask[:, end].argsort(dim=-1, descending=True, stable=True)
        lengths = attention_mask[:, end].sum(-1)
        if cache.get_seq_length() > 0:
            hooks.detach()
            text = F.pad(rows_of(inputs_embeds[:, end], order), (0, 0, 0, -behind % TEXT_STEP))
            first = order[:, :1].expand(*position.shape[:-1], 1)
            widths, steps = self._continuation(cache, text.shape[1] + new)
            steps.adopt(cache, position[..., end].gather(-1, first))
            return steps, widths, steps.extend(widths, text, lengths)
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
        widths, steps = self._continuation(cache, new)
        steps.adopt(cache, position[..., -1:] + 1, padding=behind - lengths)
        return steps, widths, said

    def _continuation(self, cache: DynamicCache, new: int) -> tuple[Widths, Continuation]:
        """With room for `new` places behind a cache; key widths of its sections."""
        sections, layers = sections_of(cache), list[Any](cache.layers)
        held = [layers[section.first].keys.shape for section in sections]
        widths = tuple(round_up(shape[2] + new, WIDTH_STEP) for shape in held)
        batch, heads, _, head_size = held[0]
        shape = (batch, *(section.stop for section in sections), *widths)
        again = shape in self._behind
        places = sum(n * len(s.layers) for n, s in zip(widths, sections, strict=True))
        size = 2 * batch * heads * head_size * places * layers[0].keys.element_size()

        def made() -> Continuation:
            head = self._model.get_output_embeddings()
            pool = GraphPool(next(head.parameters()).device)
            behind = Continuation(self._text_model, head, sections, widths, pool, batch=batch)
            self._footing.note()  # weights may have moved together
            return behind

        steps = self._behind.get(shape, made, size)
        steps.pool.open = again
        return widths, steps
