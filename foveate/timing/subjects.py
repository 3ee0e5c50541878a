"""What is timed: a vision encoder, a text model and a prompt of fixed size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from policies.adapter import Features, SaliencyTap, adapter_for
from policies.graphs.branches import at_once
from policies.products import NarrowLinear
from policies.video.llava_onevision import Adapter as LlavaOnevision
from policies.video.tiny import render, world
from policies.vision.tower import states
from stream.data import PatchGrid
from stream.memory import Memory
from stream.signals import Signal

from .past import two_steps

SCENE_FRAMES, MOVING_SHARE = 8, 0.2
QWEN_SIDE = 28
"""Patches along each side of a picture; 2 x 2 of them become a token, so 196 a grid frame."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Places of text before and behind the visual tokens, and tokens decoded after the first one.

    slots: places behind the text that actions are read from in parallel; 0 = they are decoded.
    flow_steps: passes of an action expert over the cache of the prompt. behind: rows that follow
    the prompt in a pass of their own, the slots at their end; 0 = the slots are part of the prompt.
    """

    before: int
    after: int
    decode: int
    slots: int = 0
    flow_steps: int = 0
    behind: int = 0

    @property
    def own_slots(self) -> int:
        """Slots that are part of the prompt, whose places then all see each other."""
        return 0 if self.behind else self.slots

    @property
    def read(self) -> int:
        """How many last places the head reads."""
        return max(1, self.slots)


def linear_weights(module: nn.Module) -> int:
    """Weights that each token is multiplied with."""
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, kinds))


def scene_pixels(frames: int, side: int, patch: int, generator: torch.Generator) -> Tensor:
    """[frames, 3, side, side]: scenes of SCENE_FRAMES frames that stand still up to noise of 0.02,
    in which a block of MOVING_SHARE of the picture changes from frame to frame."""
    scenes = -(-frames // SCENE_FRAMES)
    still = torch.randn(scenes, 3, side, side, generator=generator)
    pixels = still.repeat_interleave(SCENE_FRAMES, 0)[:frames]
    pixels += 0.02 * torch.randn(pixels.shape, generator=generator)
    block = int(side // patch * MOVING_SHARE**0.5) * patch
    pixels[:, :, :block, :block] = torch.randn(frames, 3, block, block, generator=generator)
    return pixels


class Subject(ABC):
    """One model and one kind of request. Requests of a batch differ in their pixels alone.

    score: what the encoder can say of each token beside its features.
    """

    score: ClassVar[Signal] = Signal.SALIENCY
    name: str
    weights: str
    prompt: Prompt
    grid: PatchGrid
    text_model: Any
    head: nn.Module

    @property
    def pts_s(self) -> tuple[float, ...]:
        """Time of each frame of the grid."""
        return tuple(float(t) for t in range(self.grid.frames))

    def memory(self) -> Memory:
        """What the stream remembers when a request comes."""
        return Memory()

    @property
    def encoder_waits(self) -> bool:
        """Whether the encoder asks the device for values, so that no graph can hold it."""
        return False

    @property
    def device(self) -> torch.device:
        return self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._weight.dtype

    @property
    def _weight(self) -> Tensor:
        weight: Tensor = next(self.text_model.parameters())
        return weight

    @abstractmethod
    def pixels(self, seed: int) -> Tensor:
        """The pictures of one request, as the encoder takes them."""

    @abstractmethod
    def encode(self, pixels: Tensor, scored: bool) -> tuple[Tensor, ...]:
        """(features [n, d],) of one request, and its `score`, float32 [n], if asked for."""

    def encode_stock(self, pixels: Tensor, scored: bool) -> tuple[Tensor, ...]:
        """The same in transformers' own way, where ours is another."""
        return self.encode(pixels, scored)

    @property
    def tower(self) -> nn.Module | None:
        """The SigLIP tower whose hidden states `finished` takes, where there is one."""
        return None

    def finished(self, hidden: Tensor, *score: Tensor) -> tuple[Tensor, ...]:
        """What `encode` gives, from hidden states [f, p, d] and received attention [f, p]."""
        raise NotImplementedError

    @abstractmethod
    def encode_flops(self, layers: Sequence[tuple[int, int]] = ()) -> float:
        """Operations of `encode` without a score.

        layers: (patches of all frames that are computed, patches each of them sees) in each layer
        of the tower, where they differ from the stock encoder's.
        """

    def score_flops(self) -> float:
        """What the score adds to `encode`."""
        return 0.0

    @abstractmethod
    def positions(self) -> Tensor:
        """Position ids of the whole unpruned prompt, long [..., 1, length]."""

    def text(self, seed: int) -> tuple[Tensor, Tensor]:
        """Embeddings [before, d] and [after, d] of random words."""
        generator = torch.Generator().manual_seed(seed)
        count = self.prompt.before + self.prompt.after
        size = int(self.text_model.config.vocab_size)
        ids = torch.randint(min(5, size - 1), size, (count,), generator=generator)
        embeds = self.text_model.get_input_embeddings()(ids.to(self.device))
        return embeds[: self.prompt.before], embeds[self.prompt.before :]


class VideoSubject(Subject):
    """A question about one video, with a model that has an adapter."""

    def __init__(self, name: str, weights: str, model: Any, frames: int, decode: int) -> None:
        self.name, self.weights = name, weights
        self._adapter = adapter_for(model)
        self._frames = frames
        self.text_model, self.head = self._adapter.text_model, model.lm_head
        self.prompt = Prompt(before=14, after=21, decode=decode)
        with torch.inference_mode():
            self.grid = self._adapter.features(self._inputs(self.pixels(0)))[1]
            self._features = self._adapter.in_fewer_kernels()

    @property
    def encoder_waits(self) -> bool:
        return hasattr(self._adapter.model.model, "visual")

    def pixels(self, seed: int) -> Tensor:
        vision = self._adapter.model.config.vision_config
        generator = torch.Generator().manual_seed(seed)
        if self.encoder_waits:
            size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
            shape = (self._frames // vision.temporal_patch_size * QWEN_SIDE**2, size)
        else:
            if self.weights == "real" and self.name == "tiny-video":
                return self._clip(seed)
            scenes = scene_pixels(self._frames, vision.image_size, vision.patch_size, generator)
            return scenes[None].to(self.device, self.dtype)
        return torch.randn(shape, generator=generator).to(self.device, self.dtype)

    def _clip(self, seed: int) -> Tensor:
        """A held-out clip of the world that the model in the box knows, without a codec's loss."""
        scene = world.make_scene("heldout", seed, self._frames)
        times_s = torch.linspace(0, scene.duration_s, self._frames + 1)[None, :-1]
        clip = render.render(render.pack_scenes([scene]), times_s)
        return ((clip - 0.5) / 0.5).to(self.device, self.dtype)

    def _inputs(self, pixels: Tensor) -> dict[str, Any]:
        if pixels.ndim == 5:
            return {"pixel_values": pixels}
        times = pixels.shape[0] // QWEN_SIDE**2
        return {"pixels": pixels, "thw": torch.tensor([[times, QWEN_SIDE, QWEN_SIDE]])}

    def encode(self, pixels: Tensor, scored: bool) -> tuple[Tensor, ...]:
        return self._encoded(self._features, pixels, scored)

    def encode_stock(self, pixels: Tensor, scored: bool) -> tuple[Tensor, ...]:
        return self._encoded(self._adapter.stock_features, pixels, scored)

    def _encoded(self, features: Features, pixels: Tensor, scored: bool) -> tuple[Tensor, ...]:
        if not scored:
            return (features(self._inputs(pixels))[0],)
        tap = SaliencyTap()
        with self._adapter.saliency(tap):
            x, grid = features(self._inputs(pixels))
        return x, self._adapter.pooled_saliency(tap.take(), [grid])[0]

    @property
    def tower(self) -> nn.Module | None:
        return None if self.encoder_waits else self._adapter.vision_model

    def finished(self, hidden: Tensor, *score: Tensor) -> tuple[Tensor, ...]:
        assert isinstance(self._adapter, LlavaOnevision)
        x = self._adapter.projected(hidden)
        return (x, *(self._adapter.pooled_saliency(s, [self.grid])[0] for s in score))

    def encode_flops(self, layers: Sequence[tuple[int, int]] = ()) -> float:
        model, (images, patches, width) = self._adapter.model.model, self._patches()
        if self.encoder_waits:
            tower, group = model.visual, model.visual.config.spatial_merge_size**2
            whole = set(tower.config.fullatt_block_indexes)
            window = min(patches, (tower.config.window_size // tower.config.patch_size) ** 2)
            blocks = list(tower.blocks)
            sees = [patches if i in whole else window for i in range(len(blocks))]
            outside = linear_weights(tower.patch_embed) + linear_weights(tower.merger) // group
        else:
            tower = model.vision_tower
            blocks = list(getattr(tower, "vision_model", tower).encoder.layers)
            sees = [patches] * len(blocks)
            outside = linear_weights(tower) - sum(map(linear_weights, blocks))
            outside += linear_weights(model.multi_modal_projector)
        layers = layers or [(images * patches, seen) for seen in sees]
        total = 2.0 * images * patches * outside
        for block, (count, seen) in zip(blocks, layers, strict=True):
            total += count * (2.0 * linear_weights(block) + 4.0 * width * seen)
        return float(total)

    def score_flops(self) -> float:
        """The logits of one layer, once more."""
        images, patches, width = self._patches()
        return 2.0 * width * images * patches**2

    def _patches(self) -> tuple[int, int, int]:
        """(images, patches of each, width) as the encoder sees them."""
        vision = self._adapter.model.config.vision_config
        side = QWEN_SIDE if self.encoder_waits else vision.image_size // vision.patch_size
        return self.grid.frames, side**2, int(vision.hidden_size)

    def positions(self) -> Tensor:
        length = self.prompt.before + self.grid.size + self.prompt.after
        ids = torch.zeros(1, length, dtype=torch.long, device=self.device)
        ids[:, self.prompt.before : -self.prompt.after] = self._adapter.placeholder()
        return self._adapter.positions(ids, torch.ones_like(ids), self.grid)


class StepSubject(Subject):
    """A control step. The frames of the grid are cameras of one tick; two ticks lie behind it."""

    @property
    def pts_s(self) -> tuple[float, ...]:
        return (0.0,) * self.grid.frames

    def memory(self) -> Memory:
        return Memory(state=dict(self._past.state))

    def positions(self) -> Tensor:
        length = self.prompt.before + self.grid.size + self.prompt.after
        return torch.arange(length, device=self.device)[None]

    @cached_property
    def _past(self) -> Memory:
        return two_steps(self.grid, torch.Generator().manual_seed(0), self.device)


class ActionSubject(StepSubject):
    """One control step of an OpenVLA-shaped policy: two towers, a projector, Llama.

    heads: `tokens` decodes each action dimension as a token; `parallel` reads all of a chunk at
    once from slots behind the prompt, under attention without a causal mask, through an MLP.
    """

    def __init__(
        self,
        name: str,
        towers: list[Any],
        projector: nn.Module,
        llm: Any,
        cameras: int,
        text: int,
        actions: int,
        chunk: int = 0,
    ) -> None:
        self.name, self.weights = name, "random"
        self._towers, self._projector = towers, projector
        self._lean = [states(tower) for tower in towers]
        self.text_model, self.head = llm.model, llm.lm_head
        vision = towers[0].config
        side = vision.image_size // vision.patch_size
        self._shape = (cameras, 3, vision.image_size, vision.image_size)
        self.grid = PatchGrid(cameras, side, side)
        if chunk:
            self.head = _ParallelHead(llm.config.hidden_size, actions).to(self.device, self.dtype)
            slots = actions * chunk
            self.prompt = Prompt(before=1, after=text + slots, decode=0, slots=slots)
        else:
            self.prompt = Prompt(before=1, after=text, decode=actions - 1)

    def pixels(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self._shape, generator=generator).to(self.device, self.dtype)

    def encode(self, pixels: Tensor, scored: bool) -> tuple[Tensor, ...]:
        return self._projected(at_once(self.device, [partial(t, pixels) for t in self._lean]))

    def encode_stock(self, pixels: Tensor, scored: bool) -> tuple[Tensor, ...]:
        return self._projected([tower(pixels).last_hidden_state for tower in self._towers])

    def _projected(self, states: list[Tensor]) -> tuple[Tensor, ...]:
        """Of the patches, which stand last."""
        seen = torch.cat([s[:, -self.grid.per_frame :] for s in states], -1)
        return (self._projector(seen).flatten(0, 1),)

    def encode_flops(self, layers: Sequence[tuple[int, int]] = ()) -> float:
        images, patches = self.grid.frames, self.grid.per_frame
        total = 2.0 * images * patches * linear_weights(self._projector)
        for tower in self._towers:
            config = tower.config
            attention = 4.0 * config.hidden_size * patches * config.num_hidden_layers
            total += images * patches * (2.0 * linear_weights(tower) + attention)
        return total


class _ParallelHead(nn.Module):
    """Hidden states of a chunk's slots [b, slots, d] -> actions [b, steps, a]: a residual MLP."""

    def __init__(self, width: int, actions: int, blocks: int = 2) -> None:
        super().__init__()
        self._actions = actions
        self.enter = nn.Sequential(
            nn.LayerNorm(width * actions), nn.Linear(width * actions, width), nn.ReLU()
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())
            for _ in range(blocks)
        )
        self.leave = nn.Sequential(nn.LayerNorm(width), NarrowLinear(width, actions))

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.enter(hidden.unflatten(1, (-1, self._actions)).flatten(2))
        for block in self.blocks:
            x = x + block(x)
        actions: Tensor = self.leave(x)
        return actions
