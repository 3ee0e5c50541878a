"""A video LLM as the pipeline sees it: an encoder of frames and a reasoner over reduced tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from stream.data import Answer, Frame
from stream.pipeline import EncodedVideo, ReducedVideo, Reply
from stream.plan import Plan
from stream.reducers.base import Reducer
from stream.signals import Signal, Signals

from .adapter import SaliencyTap, VideoAdapter, adapter_for
from .attach import check_fit
from .hooks import Positions, ReductionHooks, VideoSpan, lift
from .models import load


@dataclass(frozen=True, slots=True)
class Prompt:
    """Inputs of one batched prefill: [b, n] each, left-padded; slots: visual places of a row."""

    embeds: Tensor
    mask: Tensor
    position_ids: Tensor
    slots: list[Tensor]


class _FirstToken(StoppingCriteria):
    """Notes when the first token was ready; never stops anything."""

    def __init__(self) -> None:
        self.at_s: float | None = None

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if self.at_s is None:
            self.at_s = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class VideoReasoner:
    """Encodes frames, and answers questions about reduced videos, with one transformers model.

    positions: `keep` lets a token stand where its anchor stood; `renumber` closes the gaps.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        reducer: Reducer,
        *,
        positions: Positions = "keep",
        max_new_tokens: int = 16,
    ) -> None:
        self.adapter: VideoAdapter = adapter_for(model)
        check_fit(self.adapter, reducer)
        self._model = model
        self._processor = processor
        self._reducer = reducer
        self._positions = positions
        self._max_new_tokens = max_new_tokens
        self._needs_saliency = any(Signal.SALIENCY in s.needs for s in reducer.stages)

    @classmethod
    def load(cls, name: str, reducer: Reducer, device: str | None = None, **options: Any) -> Self:
        """By the name of a shipped model, a folder or a hub name."""
        model, processor = load(name, device)
        return cls(model, processor, reducer, **options)

    @torch.inference_mode()
    def encode(self, frames: Sequence[Frame]) -> EncodedVideo:
        """One pass of the vision encoder over consecutive frames."""
        pixels = self.adapter.pixel_inputs(frames, self._processor)
        signals = {}
        if self._needs_saliency:
            tap = SaliencyTap()
            with self.adapter.saliency(tap):
                x, grid = self.adapter.features(pixels)
            signals[Signal.SALIENCY] = self.adapter.pooled_saliency(tap.take(), [grid])[0]
        else:
            x, grid = self.adapter.features(pixels)
        times = tuple(f.pts_s for f in frames[:: self.adapter.frames_per_token()])
        return EncodedVideo(x, signals, grid, times)

    @torch.inference_mode()
    def answer(self, video: ReducedVideo, questions: Sequence[str]) -> Reply:
        """Greedy answers to all questions, as one batch behind the same video."""
        inside = tuple(s for s in self._reducer.stages if s.site.in_llm)
        hooks = ReductionHooks(
            self.adapter.text_model, self.adapter.layers, inside, self._positions
        )
        start_s = time.perf_counter()
        prompt = self.prompt(video, questions)
        first = _FirstToken()
        with hooks:
            hooks.expect([[self._span(video, slots)] for slots in prompt.slots])
            output = self._model.generate(
                inputs_embeds=prompt.embeds,
                attention_mask=prompt.mask,
                position_ids=prompt.position_ids,
                max_new_tokens=self._max_new_tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                stopping_criteria=StoppingCriteriaList([first]),
                pad_token_id=self._pad_id,
            )
            plans = tuple(span.plan for row in hooks.rows for span in row)
            text = prompt.embeds.shape[1] - video.plan.k
            lengths = tuple(float(n - text) for n in hooks.lengths())
        end_s = time.perf_counter()
        first_s = first.at_s or end_s
        timings = {"prefill": (first_s - start_s) * 1e3, "decode_tokens": (end_s - first_s) * 1e3}
        return Reply(self._answers(output), plans, lengths, timings)

    def prompt(self, video: ReducedVideo, questions: Sequence[str]) -> Prompt:
        """Questions behind one video, as the model would have laid them out, reduced.

        Positions are those of the unreduced prompt; `renumber` closes the gaps.
        """
        adapter, device = self.adapter, video.x.device
        n = video.grid.size
        trailing = adapter.trailing()
        extra = 0 if trailing is None else trailing.shape[0]
        rows = [self._ids(q, n + extra) for q in questions]
        longest = max(len(r) for r in rows)
        ids = torch.tensor([[self._pad_id] * (longest - len(r)) + r for r in rows], device=device)
        mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=device)
        position = adapter.positions(ids, mask, video.grid)

        order = Plan.keep(video.plan.anchor, n)
        places = [(row == adapter.placeholder()).nonzero().squeeze(-1) for row in ids]
        kept = torch.stack([lift([(p[:n], order)], longest, device).anchor for p in places])
        embeds = adapter.text_model.get_input_embeddings()(ids.gather(1, kept))
        slots = []
        for i, place in enumerate(places):
            slot_of = torch.empty(longest, dtype=torch.long, device=device)
            slot_of[kept[i]] = torch.arange(kept.shape[1], device=device)
            slots.append(slot_of[place[:n][video.plan.anchor]])
            embeds[i, slots[-1]] = video.x.to(embeds.dtype)
            if trailing is not None:
                embeds[i, slot_of[place[n:]]] = trailing.to(embeds.dtype)
        mask = mask.gather(1, kept)
        if self._positions == "renumber" and video.plan.k < n:
            dense = (mask.cumsum(-1) - 1).clamp_min(0)
            position = dense.expand(*position.shape[:-1], -1)
        else:
            index = kept.view((1,) * (position.ndim - 2) + kept.shape)
            position = torch.take_along_dim(position, index, dim=-1)
        return Prompt(embeds, mask, position.contiguous(), slots)

    @cached_property
    def _pad_id(self) -> int:
        tokenizer = self._processor.tokenizer
        return int(
            tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        )

    def _ids(self, question: str, placeholders: int) -> list[int]:
        """Token ids of the chat prompt with `placeholders` visual places."""
        content = [{"type": "video"}, {"type": "text", "text": question}]
        text = self._processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        ids = self._processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        at = ids.index(self.adapter.placeholder())
        return [*ids[:at], *[ids[at]] * placeholders, *ids[at + 1 :]]

    def _span(self, video: ReducedVideo, slots: Tensor) -> VideoSpan:
        return VideoSpan(slots, video.grid, video.pts_s, video.budget, video.plan, Signals({}))

    def _answers(self, output: Any) -> tuple[Answer, ...]:
        chance = torch.stack(output.logits).float().softmax(-1).amax(-1).T
        ends = self._model.generation_config.eos_token_id
        ends = set(ends) if isinstance(ends, list) else {ends}
        answers = []
        for row, p in zip(output.sequences.tolist(), chance.tolist(), strict=True):
            stop = next((i for i, token in enumerate(row) if token in ends), len(row))
            text = self._processor.tokenizer.decode(row[:stop], skip_special_tokens=True).strip()
            confidence = sum(p[: stop + 1]) / max(1, len(p[: stop + 1]))
            answers.append(Answer(text, tuple(row[:stop]), confidence))
        return tuple(answers)
