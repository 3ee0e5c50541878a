"""OpenVLA-shaped policies, pruned: batches of episodes, each with a memory of its own.

A camera without a picture is left out. All other tokens stay at the positions they have when every
camera is there, so leaving it out equals hiding it behind an attention mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedTokenizerFast

from stream.data import ActionChunk, Budget, Observation, PatchGrid
from stream.errors import AttachError, ConfigError, ValueShapeError
from stream.memory import Memory
from stream.plan import Plan
from stream.reducers.base import Reducer
from stream.reducers.identity import Identity
from stream.reducers.vla_pruner import VLAPruner
from stream.signals import Signal, Signals

from ..action_attention import ActionAttention
from ..fit import check_fit
from ..graphs.staged import Prefilled
from ..graphs.wanted import Capture, wanted
from ..hooks import INSIDE, ReductionHooks
from ..prefill import Prefill, VideoSpan
from . import reusing
from .base import PolicySpec, Prefix, Scene, VLAPolicy
from .captured import CapturedOpenVLA, Held, Parts
from .openvla_model import OpenVLA
from .prompts import Prompts


class OpenVLAPolicy(VLAPolicy):
    """An `OpenVLA` network and the reducer it is pruned by.

    Several policies may share one network. `*_batch` takes episodes of equal budget whose
    observations have the same cameras; the other methods are batches of one.

    tokenizer: of transformers; it puts BOS first.
    capture: whether it runs in fixed shapes. captured: those of a policy of the same network, to
        share; `capture` decides nothing then.

    For one thread at a time, over all policies that share a network: a call that overlaps another
    is refused with AttachError where it would mix into it.
    """

    def __init__(
        self,
        model: OpenVLA,
        tokenizer: Any,
        reducer: Reducer | None = None,
        name: str = "openvla",
        capture: Capture = "auto",
        captured: CapturedOpenVLA | None = None,
    ) -> None:
        model.train(False)
        self.model, self.tokenizer = model, tokenizer
        self.reducer = reducer or Identity()
        self.device = model.device
        check_fit(name, self.reducer, frozenset({Signal.TEXT_ROWS}), INSIDE, reuses=True)
        config = model.config
        self._spec = PolicySpec(
            name=name,
            cameras=tuple(config.cameras),
            grid=PatchGrid(len(config.cameras), model.side, model.side),
            chunk=config.chunk,
            execute=config.execute,
            action_size=config.action_size,
            state_size=config.state_size,
            dt_s=config.dt_s,
        )
        layers: Any = model.language_model.layers
        stages = () if self.reducer.reuses else self.reducer.stages
        self._hooks = ReductionHooks(model.language_model, layers, stages, "keep")
        pruner = self.reducer if isinstance(self.reducer, VLAPruner) else VLAPruner()
        self._parts = Parts.of(stages, len(layers), pruner.action_layers(len(layers)))
        if captured is None and wanted(capture, self.device):
            captured = CapturedOpenVLA(model)
        self.captured = captured
        self._texts: dict[str, Tensor] = {}
        self._places_of: dict[tuple[str, ...], Tensor] = {}

        def constant(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=self.device)

        self._state_mean, self._state_std = constant(config.state_mean), constant(config.state_std)
        self._low, self._high = constant(config.action_low), constant(config.action_high)

    @property
    def spec(self) -> PolicySpec:
        return self._spec

    def pruned_by(self, reducer: Reducer) -> OpenVLAPolicy:
        given = self.model, self.tokenizer, reducer, self._spec.name
        return OpenVLAPolicy(*given, capture="off", captured=self.captured)

    def encode(self, observation: Observation) -> Scene:
        return self.encode_batch([observation])[0]

    def prefill(self, scene: Scene, budget: Budget, memory: Memory, epoch: int = 0) -> Prefix:
        return self.prefill_batch([scene], budget, [memory], [epoch])[0]

    def act(
        self, prefix: Prefix, observation: Observation, steps: int | None = None, seed: int = 0
    ) -> tuple[ActionChunk, Tensor]:
        chunks, attention = self.act_batch([prefix], [observation], steps)
        return chunks[0], attention[0]

    @torch.inference_mode()
    def encode_batch(self, observations: Sequence[Observation]) -> list[Scene]:
        """`encode` of each, in one pass of the vision encoders."""
        seen = [
            [c for c in self._spec.cameras if o.images.get(c) is not None] for o in observations
        ]
        for observation, cameras in zip(observations, seen, strict=True):
            self._check(observation, cameras)
        pictures = [
            self._picture(o, c)
            for o, cameras in zip(observations, seen, strict=True)
            for c in cameras
        ]
        camera = [self._spec.cameras.index(c) for cameras in seen for c in cameras]
        images = torch.stack(pictures).to(self.device, non_blocking=True)
        words = [
            self._text(o.instruction)[1:]
            for o, own in zip(observations, seen, strict=True)
            for _ in own
        ]
        tokens, pointed = (self._fixed_now() or self.model).look(
            images,
            torch.tensor(camera, device=self.device),
            pad_sequence(words, batch_first=True),
            torch.tensor([len(text) for text in words], device=self.device),
        )
        counts = [len(cameras) for cameras in seen]
        split = zip(tokens.split(counts), pointed.split(counts), strict=True)
        return [
            Scene(
                x=x.flatten(0, 1),
                grid=PatchGrid(len(cameras), self.model.side, self.model.side),
                cameras=tuple(cameras),
                observation=observation,
                signals={Signal.TEXT_ROWS: (relevance / len(cameras)).flatten()},
            )
            for (x, relevance), cameras, observation in zip(split, seen, observations, strict=True)
        ]

    @torch.inference_mode()
    def prefill_batch(
        self,
        scenes: Sequence[Scene],
        budget: Budget,
        memories: Sequence[Memory],
        epochs: Sequence[int],
    ) -> list[Prefix]:
        """`prefill` of each. The prefixes share a cache and are acted from together, in order."""
        if len({scene.cameras for scene in scenes}) > 1:
            raise ValueShapeError(
                f"The scenes of a batch show {sorted({s.cameras for s in scenes})}; give them the "
                "same cameras, or prefill them apart."
            )
        texts = [self._text(scene.observation.instruction) for scene in scenes]
        places, everything = self._places(scenes[0].cameras), self._spec.grid.size
        words = [self.model.words(text) for text in texts]
        prompts = Prompts.of([scene.x for scene in scenes], words, places, everything)
        slots = torch.arange(1, 1 + places.numel(), device=self.device)
        spans = [
            VideoSpan(
                slots=slots + pad,
                grid=self._spec.grid,
                pts_s=(scene.observation.time_s,) * self._spec.grid.frames,
                budget=budget,
                plan=Plan.keep(places, everything),
                signals=Signals(scene.signals),
                memory=memory,
            )
            for scene, pad, memory in zip(scenes, prompts.pads, memories, strict=True)
        ]
        cache: Any
        seen: ReductionHooks | Prefill = self._hooks
        tokens = None
        if self.reducer.reuses:
            cache, tokens = reusing.prefill(
                self.model.language_model,
                self._hooks,
                self.reducer,
                spans,
                (prompts.rows, prompts.position, prompts.mask),
                [
                    (pad, (epoch, scene.cameras, len(text)))
                    for epoch, scene, text, pad in zip(
                        epochs, scenes, texts, prompts.pads, strict=True
                    )
                ],
            )
        elif self._parts.fit and prompts.mask is None and (fixed := self._fixed_now()):
            cache, seen = fixed.prefill(self.reducer, self._parts, spans, prompts)
        else:
            cache = DynamicCache()
            with self._hooks:
                text_from = 1 + places.numel() + min(prompts.pads)
                self._hooks.expect([[span] for span in spans], text_from)
                self.model.decode(prompts.rows, cache, prompts.position, prompts.mask)
        for memory in memories:
            memory.tick += 1
        plans = [row[0].plan.among(places) for row in seen.rows]
        watched = [row[0] for row in seen.rows_at(self._parts.watched[0])]
        lengths = (
            cache.lengths
            if isinstance(cache, Prefilled)
            else tuple(layer.get_seq_length() for layer in cache.layers)
        )
        held = partial(
            Held,
            cache=cache,
            lengths=lengths,
            text=prompts.text,
            position=prompts.position[:, -1:] + 1,
            mask=prompts.mask,
            slots=torch.stack([span.slots for span in watched]),
            anchor=torch.stack([span.plan.anchor for span in watched]),
        )
        return [
            Prefix(
                plan=plans[i],
                grid=scene.grid,
                cameras=scene.cameras,
                places=places,
                tokens=plans[i].k if tokens is None else tokens,
                cache=held(row=i),
                observed_s=scene.observation.time_s,
                epoch=epochs[i],
            )
            for i, scene in enumerate(scenes)
        ]

    @torch.inference_mode()
    def act_batch(
        self,
        prefixes: Sequence[Prefix],
        observations: Sequence[Observation],
        steps: int | None = None,
    ) -> tuple[list[ActionChunk], Tensor]:
        """`act` from all prefixes of one `prefill_batch`; attention float32 [b, grid.size]."""
        if steps not in (None, *self._spec.steps):
            raise ConfigError(f"steps is {steps}; {self._spec.name} decodes in one pass.")
        held = self._shared(prefixes)
        state = torch.from_numpy(np.stack([o.state for o in observations]))
        state = state.to(self.device, non_blocking=True)
        state = (state - self._state_mean) / self._state_std if self._spec.state_size else state
        if self._parts.fit and held.mask is None and (fixed := self._fixed_now()):
            actions, looked = fixed.act(held, self._parts, state)
            attention = looked.new_zeros(len(looked), self._spec.grid.size)
            attention.scatter_(1, held.anchor, looked.gather(1, held.slots))
        else:
            actions, attention = self._act_stock(held.stock(), state)
        actions = (actions + 1) / 2 * (self._high - self._low) + self._low
        chunks = [
            ActionChunk(chunk, prefix.observed_s)
            for chunk, prefix in zip(actions.float().cpu().numpy(), prefixes, strict=True)
        ]
        return chunks, attention[:, prefixes[0].places]

    def _fixed_now(self) -> CapturedOpenVLA | None:
        return self.captured if self.captured and self.captured.ready() else None

    def _act_stock(self, held: Held, state: Tensor) -> tuple[Tensor, Tensor]:
        """(normalised actions [b, chunk, a], attention [b, places of all cameras])"""
        rows = slice(-self._spec.chunk, None) if self.model.is_parallel else slice(-1, None)
        try:
            with self._hooks, ActionAttention(self._hooks, self._parts.watched, rows) as looked:
                actions = self._decode_actions(held, state)
            return actions, torch.stack([row[0] for row in looked.mean()])
        finally:
            for layer, length in zip(held.cache.layers, held.lengths, strict=True):
                layer.crop(length)

    def _decode_actions(self, held: Held, state: Tensor) -> Tensor:
        """Normalised actions [b, chunk, a]."""
        model, batch = self.model, len(state)
        first = torch.cat([model.state_row(state), model.query_rows(batch)], dim=1)
        hidden = self._behind(held, first, 0)
        if model.is_parallel:
            chunk: Tensor = model.action_head(hidden[:, model.state_rows :])
            return chunk.float()
        bins: list[Tensor] = []
        while True:
            bins.append(model.action_head(hidden[:, -1]).argmax(-1))
            if len(bins) == self._spec.chunk * self._spec.action_size:
                break
            row = model.bin_rows(bins[-1])[:, None]
            hidden = self._behind(held, row, first.shape[1] + len(bins) - 1)
        return model.from_bins(torch.stack(bins, dim=1)).view(batch, self._spec.chunk, -1)

    def _behind(self, held: Held, rows: Tensor, after: int) -> Tensor:
        """Decode rows that stand `after` tokens behind the prefix."""
        new = rows.shape[1]
        position = held.position + torch.arange(after, after + new, device=self.device)
        mask = held.mask
        if mask is not None:
            mask = F.pad(mask, (0, after + new), value=True)
        return self.model.decode(rows, held.cache, position, mask)

    def _check(self, observation: Observation, cameras: Sequence[str]) -> None:
        if not cameras:
            raise ValueShapeError(
                f"No camera gave a picture; {self._spec.name} needs at least one of "
                f"{', '.join(self._spec.cameras)}. Hold the robot until one is back."
            )
        size = self._spec.state_size
        if size and observation.state.shape != (size,):
            raise ValueShapeError(
                f"Observation.state has {observation.state.size} numbers, {self._spec.name} was "
                f"trained on {size}."
            )

    def _picture(self, observation: Observation, camera: str) -> Tensor:
        """float32 or uint8 [px, px, 3] on the host."""
        image = observation.images[camera]
        assert image is not None
        picture, px = torch.from_numpy(image), self.model.config.image_px
        if image.shape[:2] == (px, px):
            return picture
        planes = picture.permute(2, 0, 1)[None].float()
        planes = F.interpolate(planes, (px, px), mode="bilinear", antialias=True)
        return planes[0].permute(1, 2, 0).round().byte()

    def _text(self, instruction: str) -> Tensor:
        """Ids of the prompt, long [t], BOS first; on the device, kept for the next step."""
        if instruction not in self._texts:
            prompt = self.model.config.prompt.format(instruction=instruction)
            ids = self.tokenizer(prompt).input_ids
            self._texts[instruction] = torch.tensor(ids, device=self.device)
        return self._texts[instruction]

    def _places(self, cameras: tuple[str, ...]) -> Tensor:
        """Where the tokens of these cameras stand among those of all cameras, long; kept for the
        next step."""
        if cameras not in self._places_of:
            per_camera = self._spec.grid.per_frame
            first = [self._spec.cameras.index(camera) * per_camera for camera in cameras]
            within = torch.arange(per_camera, device=self.device)
            places = torch.tensor(first, device=self.device)[:, None] + within
            self._places_of[cameras] = places.flatten()
        return self._places_of[cameras]

    def _shared(self, prefixes: Sequence[Prefix]) -> Held:
        held: list[Held] = [prefix.cache for prefix in prefixes]
        whole = list(range(len(held[0].position)))
        if [h.row for h in held] != whole or any(h.cache is not held[0].cache for h in held):
            raise AttachError(
                "These are not the prefixes of one `prefill_batch`, all and in order; act from "
                "those together."
            )
        return held[0]


def load(
    name: str,
    reducer: Reducer | None = None,
    device: str | None = None,
    capture: Capture = "auto",
) -> OpenVLAPolicy:
    """A policy from a folder or hub name to which the network and its tokenizer were saved.

    device: default is CUDA where there is one; float32 on a CPU, bfloat16 on a GPU. capture: see
    `OpenVLAPolicy`. Raises AttachError for what cannot be loaded, also where weights are missing.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model, tokenizer = load_network(name, device, dtype)
    return OpenVLAPolicy(model, tokenizer, reducer, Path(name).name, capture)


def load_network(name: str, device: str, dtype: torch.dtype) -> tuple[OpenVLA, Any]:
    """(network in eval mode, tokenizer) of a policy; raises as `load` does."""
    read: Any = OpenVLA.from_pretrained
    try:
        model, notes = read(name, dtype=dtype, output_loading_info=True)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise AttachError(
            f"There is no OpenVLA-shaped policy in '{name}': {str(error).splitlines()[0]}"
        ) from error
    if missing := sorted(notes["missing_keys"]):
        raise AttachError(
            f"'{name}' lacks {len(missing)} weights ({missing[0]}, ...), which would be random."
        )
    return model.to(device).eval(), tokenizer
