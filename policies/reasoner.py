"""A video LLM as the pipeline sees it: an encoder of frames and a reasoner over reduced tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Self

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StoppingCriteriaList

from stream.data import Answer, Frame
from stream.pipeline import EncodedVideo, ReducedVideo, Reply
from stream.plan import Plan
from stream.reducers.base import Reducer
from stream.signals import Signal, Signals

from .adapter import VideoAdapter, adapter_for
from .graphs.greedy import GreedySteps, Listener, Progress
from .graphs.wanted import Capture, wanted
from .hooks import Positions, ReductionHooks
from .kvcache import branch
from .live_cache import LiveCache
from .models import load
from .prefill import VideoSpan, lift
from .vision.captured import CapturedEncoder
from .vision.lean import Encoder


@dataclass(frozen=True, slots=True)
class Prompt:
    """Inputs of one batched prefill: [b, n] each.

    slots: visual places, the same in every row; text_from: the place behind them. All rows are
    alike up to there; what closes a video comes next, then padding, then the question.
    """

    embeds: Tensor
    mask: Tensor
    position_ids: Tensor
    slots: Tensor
    text_from: int


class VideoReasoner:
    """Encodes frames, and answers questions about reduced videos, with one transformers model.

    positions: `keep` lets a token stand where its anchor stood; `renumber` closes the gaps.
    encoder: how the vision tower runs, see `policies.vision.lean`. capture: whether captured
    programs decode answers and, where the encoder allows it, encode. A shape is captured when it
    comes in a second request; an answer ends a request.

    For one thread at a time: an answer that begins while another one is under way is refused, and
    an encoding while another one is replayed.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        reducer: Reducer,
        *,
        positions: Positions = "keep",
        encoder: Encoder = "exact",
        capture: Capture = "auto",
        max_new_tokens: int = 16,
    ) -> None:
        self.adapter: VideoAdapter = adapter_for(model)
        self.adapter.check_fit(reducer)
        self._model = model
        self._processor = processor
        self._reducer = reducer
        self._positions = positions
        self._max_new_tokens = max_new_tokens
        self._listener: Listener | None = None
        self._needs_saliency = any(Signal.SALIENCY in s.needs for s in reducer.stages)
        self._lean = self.adapter.lean(encoder)
        captures = wanted(capture, model.device)
        self._steps = GreedySteps.of(model, self.adapter.text_model) if captures else None
        captures = captures and not self.adapter.encoder_waits
        self._encoder = CapturedEncoder(self.adapter, self._needs_saliency) if captures else None

    @classmethod
    def load(cls, name: str, reducer: Reducer, device: str | None = None, **options: Any) -> Self:
        """By the name of a shipped model, a folder or a hub name."""
        model, processor = load(name, device)
        return cls(model, processor, reducer, **options)

    @torch.inference_mode()
    def encode(self, frames: Sequence[Frame]) -> EncodedVideo:
        """One pass of the vision encoder over consecutive frames."""
        pixels = self.adapter.pixel_inputs(frames, self._processor)
        if self._lean is not None:
            x, grid, signals = self.adapter.lean_features(self._lean, pixels, self._needs_saliency)
        elif self._encoder is not None:
            x, grid, signals = self._encoder.encoded(pixels)
        else:
            x, grid, signals = self.adapter.encoded(pixels, self._needs_saliency)
        times = tuple(f.pts_s for f in frames[:: self.adapter.frames_per_token()])
        return EncodedVideo(x, signals, grid, times)

    @torch.inference_mode()
    def answer(
        self, video: ReducedVideo, questions: Sequence[str], cached: DynamicCache | None = None
    ) -> Reply:
        """Greedy answers to all questions, as one batch behind the same video.

        Where nothing inside the model depends on the question, the video is prefilled once and its
        KV cache serves all questions. cached: of the first tokens of that prompt, if there is one;
        it is not changed.
        """
        inside = tuple(s for s in self._reducer.stages if s.site.in_llm)
        hooks = ReductionHooks(
            self.adapter.text_model, self.adapter.layers, inside, self._positions
        )
        if self._encoder is not None:
            self._encoder.end_request()
        start_s = time.perf_counter()
        prompt = self.prompt(video, questions)
        alone = len(questions) == 1
        whole = inside or (alone and cached is None)
        steps = self._steps if self._steps and self._steps.ready() else None
        to_question = steps is not None or not alone
        progress = Progress(self._listener)
        behind = prompt.embeds.shape[1] - prompt.text_from
        decode = steps and partial(steps.decode, progress=progress, hooks=hooks, behind=behind)
        with hooks:
            cache = None if whole else self._shared_prefill(prompt, cached, to_question, steps)
            if inside:
                span = VideoSpan(
                    prompt.slots, video.grid, video.pts_s, video.budget, video.plan, Signals({})
                )
                hooks.expect([[span]] * len(questions), text_from=prompt.text_from)
            output = self._model.generate(
                inputs_embeds=prompt.embeds,
                attention_mask=prompt.mask,
                position_ids=prompt.position_ids,
                past_key_values=cache,
                generation_config=self._generation(),
                stopping_criteria=None if decode else StoppingCriteriaList([progress]),
                custom_generate=decode,
            )
            text = prompt.embeds.shape[1] - video.plan.k
            reduced = [float(n - text) for n in hooks.lengths()]
            plans = [span.plan for row in hooks.rows for span in row]
        end_s = time.perf_counter()
        first_s = progress.at_s or end_s
        timings = {"prefill": (first_s - start_s) * 1e3, "decode_tokens": (end_s - first_s) * 1e3}
        return Reply(
            self._answers(output),
            tuple(plans or [video.plan] * len(questions)),
            tuple(reduced or [float(video.plan.k)] * len(self.adapter.layers)),
            timings,
        )

    @contextmanager
    def generating(self, max_new_tokens: int, listener: Listener) -> Iterator[None]:
        """Answers given within the block, by this thread alone, are so long at most, and `listener`
        follows them token by token."""
        before = self._max_new_tokens, self._listener
        self._max_new_tokens, self._listener = max_new_tokens, listener
        try:
            yield
        finally:
            self._max_new_tokens, self._listener = before

    def live_cache(self, reanchor: str = "rotate") -> LiveCache:
        """An empty memory for one stream."""
        return LiveCache(self, reanchor)

    def frames_per_token(self) -> int:
        return self.adapter.frames_per_token()

    @torch.inference_mode()
    def words(self, text: str) -> Tensor:
        """[w, d]: the tokens of a text as they enter the language model."""
        ids = self._processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        embed = self.adapter.text_model.get_input_embeddings()
        words: Tensor = embed(ids["input_ids"][0].to(self.adapter.model.device))
        return words

    def text_tokens(self, question: str) -> int:
        """Tokens of a prompt beside its visual ones."""
        return len(self._ids(question, 0))

    def text_of(self, token_ids: Sequence[int]) -> str:
        """What a reader sees of an answer; ends and other control tokens are left out."""
        text: str = self._processor.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text.strip()

    def control_tokens(self, text: str) -> list[str]:
        """What of a text the tokenizer takes for something else than text."""
        tokenizer = self._processor.tokenizer
        ids = set(tokenizer(text, add_special_tokens=False)["input_ids"])
        special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        return [str(token) for token in tokenizer.convert_ids_to_tokens(sorted(ids & special))]

    @property
    def context_tokens(self) -> int:
        """The longest prompt and answer that the language model was made for."""
        return int(self.adapter.text_model.config.max_position_embeddings)

    def _shared_prefill(
        self,
        prompt: Prompt,
        cached: DynamicCache | None,
        to_question: bool,
        steps: GreedySteps | None,
    ) -> DynamicCache:
        """KV cache of what all rows begin with, for each row; a branch of `cached`, if given.

        to_question: it reaches as far as the rows are alike; else what `cached` lacks is left.
        """
        if steps is not None and cached is None:
            cached = steps.prefix(
                prompt.embeds[:1, : prompt.text_from],
                prompt.position_ids[..., :1, : prompt.text_from],
            )
        cache = (
            DynamicCache(config=self.adapter.text_model.config)
            if cached is None
            else branch(cached)
        )
        new = slice(cache.get_seq_length(), prompt.text_from)
        if to_question and new.start < new.stop:
            self.adapter.text_model(
                inputs_embeds=prompt.embeds[:1, new],
                attention_mask=prompt.mask[:1, : new.stop],
                position_ids=prompt.position_ids[..., :1, new],
                past_key_values=cache,
                use_cache=True,
            )
        return branch(cache, prompt.embeds.shape[0])

    def prompt(self, video: ReducedVideo, questions: Sequence[str]) -> Prompt:
        """Questions behind one video, as the model would have laid them out, reduced.

        Positions are those of the unreduced prompt; `renumber` closes the gaps.
        """
        adapter, device = self.adapter, video.x.device
        n = video.grid.size
        trailing = adapter.trailing()
        extra = 0 if trailing is None else trailing.shape[0]
        rows = [self._ids(q, n + extra) for q in questions]
        longest = max(map(len, rows))
        start = rows[0].index(adapter.placeholder())
        stop = start + n + extra
        ids = torch.full((len(rows), longest), self._pad_id, device=device)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            tail = longest - (len(row) - stop)
            for place, part in ((slice(0, stop), row[:stop]), (slice(tail, None), row[stop:])):
                ids[i, place] = torch.tensor(part, device=device)
                mask[i, place] = 1
        position = adapter.positions(ids, mask, video.grid)

        places = torch.arange(start, start + n, device=device)
        kept = lift([(places, Plan.keep(video.plan.anchor, n))], longest, device).anchor
        slot_of = torch.empty(longest, dtype=torch.long, device=device)
        slot_of[kept] = torch.arange(kept.numel(), device=device)
        slots = slot_of[places[video.plan.anchor]]
        embeds = adapter.text_model.get_input_embeddings()(ids[:, kept])
        embeds[:, slots] = video.x.to(embeds.dtype)
        if trailing is not None:
            embeds[:, slot_of[start + n : stop]] = trailing.to(embeds.dtype)
        mask, position = mask[:, kept], position[..., kept]
        if self._positions == "renumber" and video.plan.k < n:
            position = (mask.cumsum(-1) - 1).clamp_min(0).expand(*position.shape[:-1], -1)
        return Prompt(embeds, mask, position.contiguous(), slots, start + video.plan.k)

    def _generation(self) -> GenerationConfig:
        """Over the model's own settings. Without one, `generate` builds the model's configuration
        anew to look for such settings there, which takes it longer than a decode step."""
        return GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=self._max_new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=self._pad_id,
        )

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

    def _answers(self, output: Any) -> tuple[Answer, ...]:
        chance = torch.stack(output.logits).float().softmax(-1).amax(-1).T
        ends = self._model.generation_config.eos_token_id
        ends = set(ends) if isinstance(ends, list) else {ends}
        answers = []
        for row, p in zip(output.sequences.tolist(), chance.tolist(), strict=True):
            stop = next((i for i, token in enumerate(row) if token in ends), len(row))
            text = self.text_of(row[:stop])
            confidence = sum(p[: stop + 1]) / max(1, len(p[: stop + 1]))
            answers.append(Answer(text, tuple(row[:stop]), confidence))
        return tuple(answers)
