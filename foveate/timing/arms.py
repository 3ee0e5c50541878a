"""The ways to answer one request: stock and fixed-shape, with all visual tokens and with few.

Work over tensors on one device; nothing here waits for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import DynamicCache

from policies.graphs.buckets import Bucket
from policies.graphs.capture import GraphPool, Program
from policies.graphs.decoder import StaticDecoder
from policies.hooks import ReductionHooks
from policies.prefill import VideoSpan
from policies.vision.merging import MergingTower
from policies.vision.skipping import Layout, SkippingTower
from stream.data import Budget
from stream.pipeline import EncodedVideo, reduce_video
from stream.plan import Plan
from stream.reducers.base import Reducer
from stream.signals import Signals

from .clock import StageClock
from .subjects import Subject

TEXT_STEP = 16
"""Text behind the video is padded to a multiple of this in fixed shapes."""


class Arm(ABC):
    """One way to answer `batch` requests at once; a context manager around each call.

    visual: visual tokens that enter the language model. layer_tokens: and each of its layers.
    scored: whether it asks the encoder for the subject's `score`. first: stages until the first
    token, or the actions, are there. pool: of its graphs, if it has any. said: logits of the first
    token or actions of the last call, [batch, ...].
    """

    said: Tensor

    pool: GraphPool | None

    first: ClassVar[tuple[str, ...]] = ("encode", "reduce", "prefill")

    name: str

    def __init__(
        self, subject: Subject, reducer: Reducer | None, retain: float, batch: int
    ) -> None:
        self.subject, self.reducer, self.retain, self.batch = subject, reducer, retain, batch
        stages = () if reducer is None else reducer.stages
        self.inside = tuple(s for s in stages if s.site.in_llm)
        self.scored = any(subject.score in s.needs for s in stages if not s.site.in_llm)
        self.budget = Budget.ratio(retain, of=subject.grid.size)
        self.visual = subject.grid.size
        for stage in stages:
            if not stage.site.in_llm:
                self.visual = stage.keeps(self.visual, self.budget)
        depth, now = len(subject.text_model.layers), self.visual
        at = {s.site.layer_index(depth): s for s in self.inside}
        self.layer_tokens = []
        for layer in range(depth):
            now = at[layer].keeps(now, self.budget) if layer in at else now
            self.layer_tokens.append(now)
        before, after = subject.text(seed=1)
        self.before, self.after = (t.expand(batch, -1, -1) for t in (before, after))
        self.positions = subject.positions()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(self.attached())
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def key(self) -> str:
        """Name and share, unique within a run."""
        return self.name if self.reducer is None else f"{self.name} {self.retain:g}"

    def attached(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def prepare(self, pixels: list[Tensor]) -> None:  # noqa: B027
        """What is done before a request comes, once; nothing, if not stated otherwise."""

    def tower_layers(self) -> list[tuple[int, int]]:
        """See `Subject.encode_flops`; empty for the stock encoder."""
        return []

    def acting_flops(self, lengths: Sequence[int]) -> dict[str, float]:
        """Operations of the stages that make actions behind a prefill, by stage; lengths: places of
        the prompt in each layer."""
        return {}

    def feature_error(self, pixels: Tensor) -> float | None:
        """Relative error of the features against the stock encoder's; None for the stock one, and
        for random weights, of which no quality can be said."""
        return None

    @abstractmethod
    def run(self, clock: StageClock, pixels: list[Tensor]) -> Tensor:
        """Answer; tokens long [batch, 1 + decode], or actions [batch, steps, a]."""

    def _encoded(self, parts: list[tuple[Tensor, ...]]) -> list[EncodedVideo]:
        grid, times = self.subject.grid, self.subject.pts_s
        score = self.subject.score
        return [EncodedVideo(p[0], {score: p[1]} if p[1:] else {}, grid, times) for p in parts]

    def _reduced(self, parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, list[Plan]]:
        """(features [batch, visual, d], plans) after the stages before the language model."""
        encoded = self._encoded(parts)
        if self.reducer is None:
            size, device = self.subject.grid.size, self.subject.device
            return torch.stack([e.x for e in encoded]), [Plan.identity(size, device)] * self.batch
        videos = [
            reduce_video(e, self.reducer, self.budget, self.subject.memory()) for e in encoded
        ]
        return torch.stack([v.x for v in videos]), [v.plan for v in videos]

    def _position_ids(self, anchor: Tensor, after: int) -> Tensor:
        """Positions of a prompt whose visual tokens stand at `anchor` (long [batch, k])."""
        before, size = self.before.shape[1], self.subject.grid.size
        text = torch.arange(after, device=anchor.device)
        text = (before + size + text).clamp_max(self.positions.shape[-1] - 1)
        head = torch.arange(before, device=anchor.device).expand(len(anchor), -1)
        index = torch.cat([head, before + anchor, text.expand(len(anchor), -1)], 1)
        return self.positions[..., 0, :][..., index].contiguous()


class EagerArm(Arm):
    """transformers' own forward with a growing cache, SDPA, every kernel launched by the host."""

    name = "eager"
    pool = None

    def attached(self) -> AbstractContextManager[Any]:
        model = self.subject.text_model
        self._hooks = ReductionHooks(model, model.layers, self.inside, "keep")
        stack = ExitStack()
        if self.inside:
            stack.enter_context(self._hooks)
        if self.subject.prompt.own_slots:
            for layer in model.layers:
                stack.callback(setattr, layer.self_attn, "is_causal", layer.self_attn.is_causal)
                layer.self_attn.is_causal = False
        return stack

    def run(self, clock: StageClock, pixels: list[Tensor]) -> Tensor:
        subject, prompt = self.subject, self.subject.prompt
        with clock.stage("encode"):
            parts = [subject.encode_stock(p, self.scored) for p in pixels]
        with clock.stage("reduce"):
            x, plans = self._reduced(parts)
        with clock.stage("prefill"):
            anchor = torch.stack([plan.anchor for plan in plans])
            embeds = torch.cat([self.before, x.to(self.before.dtype), self.after], 1)
            ids = self._position_ids(anchor, self.after.shape[1])
            if self.inside:
                self._expect(plans)
            cache = DynamicCache(config=subject.text_model.config)
            hidden = self._forward(cache, ids, embeds)
            self.said = subject.head(hidden[:, -prompt.read :])
        if prompt.slots:
            return self._acted(clock, cache)
        tokens = [self.said[:, -1:].argmax(-1)]
        with clock.stage("tokens"):
            for step in range(1, prompt.decode + 1):
                embeds = subject.text_model.get_input_embeddings()(tokens[-1])
                hidden = self._forward(cache, ids[..., -1:] + step, embeds)
                tokens.append(subject.head(hidden).argmax(-1))
        return torch.cat(tokens, 1)

    def _acted(self, clock: StageClock, cache: DynamicCache) -> Tensor:
        """Actions behind a prefill."""
        return self.said

    def _forward(self, cache: DynamicCache, ids: Tensor, embeds: Tensor) -> Tensor:
        out = self.subject.text_model(
            inputs_embeds=embeds, position_ids=ids, past_key_values=cache, use_cache=True
        )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _expect(self, plans: list[Plan]) -> None:
        first = self.before.shape[1]
        slots = torch.arange(first, first + self.visual, device=self.subject.device)
        one = self.subject
        rows = [
            [VideoSpan(slots, one.grid, one.pts_s, self.budget, plan, Signals({}), one.memory())]
            for plan in plans
        ]
        length, actions = first + self.visual + self.after.shape[1], one.prompt.own_slots
        prompt = torch.arange(length, device=slots.device) < length - actions
        self._hooks.expect(rows, first + self.visual, prompt.expand(self.batch, -1))


class FixedArm(Arm):
    """The same in fixed shapes: captured graphs on CUDA, the same calls as they stand elsewhere."""

    name = "graph"
    pool: GraphPool

    def __init__(
        self,
        subject: Subject,
        reducer: Reducer | None,
        retain: float,
        batch: int,
        pool: GraphPool,
    ) -> None:
        super().__init__(subject, reducer, retain, batch)
        self.pool = pool
        prompt = subject.prompt
        real = self.after.shape[1]
        padding = 0 if prompt.own_slots else -real % TEXT_STEP
        self.after = torch.nn.functional.pad(self.after, (0, 0, 0, padding))
        self.bucket = self._bucket()
        eager = GraphPool(subject.device, enabled=False)
        self._encode = Program(
            eager if subject.encoder_waits else pool,
            f"The encoder of {subject.name}",
            lambda pixels: subject.encode(pixels, self.scored),
        )
        self.decoder = StaticDecoder(
            subject.text_model,
            subject.head,
            [self.bucket],
            pool,
            batch=batch,
            stages=self.inside,
            read=prompt.read,
            bidirectional=prompt.own_slots > 0,
            keeps=prompt.own_slots == 0 or prompt.flow_steps > 0,
            memory=subject.memory,
        )
        length = self.bucket.before + self.visual + real
        self._lengths = torch.full((batch,), length, device=subject.device)

    def _bucket(self) -> Bucket:
        return Bucket(
            before=self.before.shape[1],
            visual=self.visual,
            after=self.after.shape[1],
            new=self.subject.prompt.decode + 1 + self.subject.prompt.behind,
            budget=self.budget.tokens,
            grid=self.subject.grid,
        )

    def run(self, clock: StageClock, pixels: list[Tensor]) -> Tensor:
        prompt, decoder = self.subject.prompt, self.decoder
        with clock.stage("encode"):
            parts = [self.encoded(p) for p in pixels]
        with clock.stage("reduce"):
            x, plans = self._reduced(parts)
        with clock.stage("prefill"):
            anchor = torch.stack([plan.anchor for plan in plans])
            embeds = torch.cat([self.before, x.to(self.before.dtype), self.after], 1)
            ids = self._position_ids(anchor, self.after.shape[1])
            self.said = decoder.prefill(self.bucket, embeds, ids, self._lengths, anchor)
        return self._acted(clock) if prompt.slots else self._decoded(clock)

    def attached(self) -> AbstractContextManager[Any]:
        return self.decoder

    def encoded(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """What `Subject.encode` gives for one request."""
        return tuple(t.clone() for t in self._encode(pixels))

    def _acted(self, clock: StageClock) -> Tensor:
        """Actions behind a prefill."""
        return self.said.clone()

    def _decoded(self, clock: StageClock) -> Tensor:
        tokens = [self.decoder.token.clone()]
        with clock.stage("tokens"):
            for _ in range(self.subject.prompt.decode):
                self.decoder.step(self.decoder.widths(self.bucket))
                tokens.append(self.decoder.token.clone())
        return torch.cat(tokens, 1)


class LeanArm(FixedArm):
    """The encoder computes less; see policies/vision."""

    def feature_error(self, pixels: Tensor) -> float | None:
        if self.subject.weights != "real":
            return None
        exact = self.subject.encode(pixels, False)[0].float()
        return float((self.encoded(pixels)[0].float() - exact).norm() / exact.norm())


class MergingArm(LeanArm):
    """Patches that are alike are merged inside the encoder."""

    name = "graph, merging encoder"

    def __init__(
        self, subject: Subject, reducer: Reducer | None, retain: float, batch: int, pool: GraphPool
    ) -> None:
        super().__init__(subject, reducer, retain, batch, pool)
        assert subject.tower is not None
        self._tower = tower = MergingTower.usual(subject.tower)
        self._encode = Program(
            pool,
            f"The merging encoder of {subject.name}",
            lambda pixels: subject.finished(*tower(pixels.flatten(0, 1), self.scored)),
        )

    def tower_layers(self) -> list[tuple[int, int]]:
        frames = self.subject.grid.frames
        return [(frames * n, n) for n in self._tower.patches()]


class SkippingArm(LeanArm):
    """Patches that did not change since a key frame are not encoded again."""

    name = "graph, skipping encoder"

    def __init__(
        self, subject: Subject, reducer: Reducer | None, retain: float, batch: int, pool: GraphPool
    ) -> None:
        super().__init__(subject, reducer, retain, batch, pool)
        assert subject.tower is not None
        self._tower = SkippingTower(subject.tower)
        self._by_keys: dict[int, Program] = {}
        self._work_of_last = (0, 0)

    def tower_layers(self) -> list[tuple[int, int]]:
        """Of the last request."""
        return [self._work_of_last] * self._tower.depth

    def encoded(self, pixels: Tensor) -> tuple[Tensor, ...]:
        frames = pixels.flatten(0, 1)
        layout = self._tower.layout(frames)
        self._work_of_last = (self._tower.computed(layout), self._tower.seen(layout))
        keys = layout.keys.numel()
        if keys not in self._by_keys:
            name = f"The encoder of {self.subject.name} with {keys} key frames"
            self._by_keys[keys] = Program(self.pool, name, self._work)
        return tuple(t.clone() for t in self._by_keys[keys](frames, *layout))

    def _work(self, frames: Tensor, *layout: Tensor) -> tuple[Tensor, ...]:
        seen = self._tower(frames, Layout(*layout), self.scored)
        return self.subject.finished(*seen)


class AttachedArm(FixedArm):
    """A question about a stream whose frames are encoded, reduced and prefilled already."""

    name = "attached"
    first = ("question",)

    def _bucket(self) -> Bucket:
        """One place of text closes the video; the rest of it is the question."""
        own = FixedArm._bucket(self)
        return replace(own, after=1, new=own.after - 1 + own.new)

    def prepare(self, pixels: list[Tensor]) -> None:
        x, plans = self._reduced([self.encoded(p) for p in pixels])
        anchor = torch.stack([plan.anchor for plan in plans])
        embeds = torch.cat([self.before, x.to(self.before.dtype), self.after[:, :1]], 1)
        prefix = torch.full_like(self._lengths, embeds.shape[1])
        ids = self._position_ids(anchor, 1)
        self.decoder.prefill(self.bucket, embeds, ids, prefix, anchor)
        self._question = self._lengths - prefix

    def run(self, clock: StageClock, pixels: list[Tensor]) -> Tensor:
        with clock.stage("question"):
            self.decoder.rewind()
            widths = self.decoder.widths(self.bucket)
            self.said = self.decoder.extend(widths, self.after[:, 1:], self._question)
        return self._decoded(clock)
