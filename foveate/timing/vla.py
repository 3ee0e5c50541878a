"""A control step of an OpenVLA-shaped network with weights of its own.

The prompt is prefilled, and the robot's state and the places of a chunk of actions follow it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from policies.vision.tower import States
from policies.vla.openvla_model import OpenVLA, VisionTower
from stream.data import PatchGrid
from stream.signals import Signal

from .subjects import Prompt, StepSubject, linear_weights

INSTRUCTION = "push the red puck to the goal"
STATE_SEED = 2


class VLASubject(StepSubject):
    """All cameras of a network, whose actions are read in parallel.

    score: where the words point in the pictures. state: normalised, float32 [1, s].
    """

    score: ClassVar[Signal] = Signal.TEXT_ROWS

    def __init__(self, name: str, model: OpenVLA, tokenizer: Any) -> None:
        self.name, self.weights, self._model = name, "real", model
        self.text_model, self.head = model.language_model, model.action_head
        self._encoders = model.lean_encoders()
        config: Any = model.config
        self.grid = PatchGrid(len(config.cameras), model.side, model.side)
        words = tokenizer(config.prompt.format(instruction=INSTRUCTION)).input_ids
        self._words = torch.tensor(words, device=self.device)
        self._cameras = torch.arange(self.grid.frames, device=self.device)
        self.prompt = Prompt(
            before=1,
            after=len(words) - 1,
            decode=0,
            slots=config.chunk,
            behind=model.state_rows + config.chunk,
        )
        generator = torch.Generator().manual_seed(STATE_SEED)
        self.state = torch.randn(1, config.state_size, generator=generator).to(self.device)

    def pixels(self, seed: int) -> Tensor:
        """Pictures of noise, uint8 [cameras, px, px, 3]."""
        generator = torch.Generator().manual_seed(seed)
        px = self._model.config.image_px
        shape = (self.grid.frames, px, px, 3)
        pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        return pixels.to(self.device)

    def encode(self, pixels: Tensor, scored: bool) -> tuple[Tensor, ...]:
        return self._encoded(pixels, scored, self._encoders)

    def encode_stock(self, pixels: Tensor, scored: bool) -> tuple[Tensor, ...]:
        return self._encoded(pixels, scored, None)

    def _encoded(
        self, pixels: Tensor, scored: bool, encoders: Sequence[States] | None
    ) -> tuple[Tensor, ...]:
        if not scored:
            return (self._model.see(pixels, self._cameras, encoders).flatten(0, 1),)
        words = self._words[1:].expand(len(pixels), -1)
        length = torch.full_like(self._cameras, words.shape[1])
        x, pointed = self._model.look(pixels, self._cameras, words, length, encoders)
        return x.flatten(0, 1), (pointed / len(pixels)).flatten()

    def text(self, seed: int) -> tuple[Tensor, Tensor]:
        """Of INSTRUCTION, whatever the seed."""
        words = self._model.words(self._words)
        return words[:1], words[1:]

    def rows(self, state: Tensor) -> Tensor:
        """What follows the prompt: [b, behind, d], of a normalised state [b, s]."""
        model = self._model
        return torch.cat([model.state_row(state), model.query_rows(len(state))], 1)

    def rows_flops(self) -> float:
        """Operations of `rows`, and of the head behind them."""
        state: Any = self._model.proprioception
        entering = linear_weights(state) if self._model.state_rows else 0
        return 2.0 * (entering + self.prompt.slots * linear_weights(self.head))

    def encode_flops(self, layers: Sequence[tuple[int, int]] = ()) -> float:
        model, patches = self._model, self.grid.per_frame
        each = 2.0 * patches * linear_weights(model.projector)
        for tower in model.towers:
            assert isinstance(tower, VisionTower)
            config: Any = tower.encoder.config
            attention = 4.0 * tower.width * patches * config.num_hidden_layers
            each += patches * (2.0 * linear_weights(tower.encoder) + attention)
            px = model.config.image_px
            for conv in (m for m in tower.stem.modules() if isinstance(m, nn.Conv2d)):
                px //= conv.stride[0]
                each += 2.0 * px**2 * conv.weight.numel()
        return self.grid.frames * each

    def score_flops(self) -> float:
        pointer, width = self._model.pointer, int(self.text_model.config.hidden_size)
        named = 1 if pointer is None else self._model.config.pointers
        words = 0 if pointer is None else linear_weights(pointer)
        return self.grid.frames * 2.0 * (words + self.grid.per_frame * width * named)
