"""LLaVA-OneVision: SigLIP, bilinear pooling to a square grid, one newline after each video."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llava_onevision.modeling_llava_onevision import (
    LlavaOnevisionMultiModalProjector,
)

from stream.data import Frame, PatchGrid
from stream.errors import AttachError
from stream.ops.grids import pool_features, pool_map
from stream.signals import Signal

from ..adapter import Features, VideoAdapter, VideoPlace
from ..graphs.footing import hooked
from ..vision.layout import row_after_row
from ..vision.lean import Encoder, Lean, lean_tower
from ..vision.tower import LeanTower


class Adapter(VideoAdapter):
    """`LlavaOnevisionForConditionalGeneration`; images pass unreduced, videos are reduced."""

    encoder_waits = False

    @property
    def vision_model(self) -> PreTrainedModel:
        tower: PreTrainedModel = self.model.model.vision_tower
        return tower

    @property
    def saliency_layer(self) -> nn.Module:
        chosen = self.model.config.vision_feature_layer
        if not isinstance(chosen, int):
            raise AttachError(
                f"vision_feature_layer is {chosen}; saliency is defined for a single layer."
            )
        modules = [m for m in self.vision_model.modules() if type(m).__name__.endswith("Layer")]
        layers = [m for m in modules if hasattr(m, "self_attn")]
        index = len(layers) + chosen if chosen < 0 else chosen - 1
        return layers[index].get_submodule("self_attn")

    @property
    def _side(self) -> int:
        vision = self.model.config.vision_config
        return int(vision.image_size) // int(vision.patch_size)

    @property
    def _pooled_side(self) -> int:
        return math.ceil(self._side / 2)

    def _grid(self, frames: int) -> PatchGrid:
        return PatchGrid(frames, self._pooled_side, self._pooled_side)

    def pooled_saliency(self, scores: Tensor, grids: Sequence[PatchGrid]) -> list[Tensor]:
        side, pooled = self._side, self._pooled_side
        video = scores[-sum(g.frames for g in grids) :]
        maps = pool_map(video, side, side, pooled, pooled)
        return [part.reshape(-1) for part in maps.split([g.frames for g in grids])]

    def places(self, inputs: dict[str, Any]) -> list[list[VideoPlace]]:
        ids, pixels = inputs.get("input_ids"), inputs.get("pixel_values_videos")
        if ids is None or pixels is None:
            return []
        grid = self._grid(pixels.shape[1])
        times = tuple(float(t) for t in range(grid.frames))
        rows = []
        for row in ids:
            slots = (row == self.placeholder()).nonzero().squeeze(-1)
            videos = slots.split(grid.size + 1) if slots.numel() else ()
            rows.append([VideoPlace(v[:-1], grid, times) for v in videos])
        return rows

    def pixel_inputs(self, frames: Sequence[Frame], processor: Any) -> dict[str, Any]:
        video = [torch.from_numpy(f.image).permute(2, 0, 1) for f in frames]
        same = all(v.shape == video[0].shape for v in video)
        batches = [torch.stack(video)] if same else [v[None] for v in video]
        done = [
            processor.video_processor(
                videos=[b], return_tensors="pt", do_sample_frames=False, device=self.model.device
            )
            for b in batches
        ]
        pixels = torch.cat([d["pixel_values_videos"] for d in done], dim=1)
        return {"pixel_values": pixels}

    def features(self, pixels: dict[str, Any]) -> tuple[Tensor, PatchGrid]:
        with row_after_row(self.model.model, self._side, self._pooled_side):
            return self.stock_features(pixels)

    def stock_features(self, pixels: dict[str, Any]) -> tuple[Tensor, PatchGrid]:
        values = pixels["pixel_values"].to(self.model.device, self.model.dtype)
        config = self.model.config
        output = self.model.model.get_video_features(
            values,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            return_dict=True,
        )
        return output.pooler_output[0], self._grid(values.shape[1])

    def in_fewer_kernels(self) -> Features:
        config, tower = self.model.config, LeanTower.of(self.vision_model)
        layer, whole = config.vision_feature_layer, config.vision_feature_select_strategy == "full"
        if tower is None or not isinstance(layer, int) or not whole:
            return self.features
        depth = layer % (len(tower.layers) + 1)

        def features(pixels: dict[str, Any]) -> tuple[Tensor, PatchGrid]:
            frames = pixels["pixel_values"].to(self.model.device, self.model.dtype).flatten(0, 1)
            return self.projected(tower.hidden(frames, depth)), self._grid(len(frames))

        return features

    def lean(self, encoder: Encoder) -> Lean | None:
        return lean_tower(self.vision_model, encoder)

    def lean_features(
        self, lean: Lean, pixels: dict[str, Any], saliency: bool
    ) -> tuple[Tensor, PatchGrid, dict[Signal, Tensor]]:
        frames = pixels["pixel_values"].to(self.model.device, self.model.dtype).flatten(0, 1)
        hidden, *scores = lean(frames, saliency)
        grid = self._grid(frames.shape[0])
        signals = {Signal.SALIENCY: self.pooled_saliency(scores[0], [grid])[0]} if saliency else {}
        return self.projected(hidden), grid, signals

    def projected(self, hidden: Tensor) -> Tensor:
        """Hidden states of the vision tower [f, patches, d] -> features as `features` gives."""
        own, side, pooled = self.model.model.multi_modal_projector, self._side, self._pooled_side

        def pool(x: Tensor) -> Tensor:
            return pool_features(x, side, side, pooled, pooled)

        if type(own) is not LlavaOnevisionMultiModalProjector or any(map(hooked, own.modules())):
            return pool(own(hidden)).flatten(0, 1)
        # A pooled patch is a mean, so the last product is as well taken of a quarter of the rows.
        features: Tensor = own.linear_2(pool(own.act(own.linear_1(hidden))))
        return features.flatten(0, 1)

    def placeholder(self) -> int:
        return int(self.model.config.video_token_id)

    def trailing(self) -> Tensor | None:
        newline: Tensor = self.model.model.image_newline
        return newline[None]

    def positions(self, input_ids: Tensor, mask: Tensor, grid: PatchGrid) -> Tensor:
        return (mask.long().cumsum(-1) - 1).clamp_min(0)
