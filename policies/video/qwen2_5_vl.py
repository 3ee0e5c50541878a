"""Qwen2.5-VL: windowed vision encoder, 2 x 2 patch merging, three-axis rotary positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stream.data import Frame, PatchGrid

from ..adapter import VideoAdapter, VideoPlace


class Adapter(VideoAdapter):
    """`Qwen2_5_VLForConditionalGeneration`.

    Rotary ids come from the unpruned prompt and are sliced, so a merged token stands where its
    anchor stood; `rope_deltas` keep their meaning.
    """

    @property
    def vision_model(self) -> PreTrainedModel:
        tower: PreTrainedModel = self.model.model.visual
        return tower

    @property
    def saliency_layer(self) -> nn.Module:
        return self.vision_model.get_submodule(
            f"blocks.{len(self.model.model.visual.blocks) - 1}.attn"
        )

    @property
    def _merge(self) -> int:
        return int(self.model.config.vision_config.spatial_merge_size)

    def _grid(self, thw: Tensor) -> PatchGrid:
        frames, rows, cols = (int(v) for v in thw)
        return PatchGrid(frames, rows // self._merge, cols // self._merge)

    def pooled_saliency(self, scores: Tensor, grids: Sequence[PatchGrid]) -> list[Tensor]:
        group = self._merge**2
        merged = scores.reshape(-1, group).mean(-1)
        merged = merged[-sum(g.size for g in grids) :]
        thw = torch.tensor([[g.frames, g.rows * self._merge, g.cols * self._merge] for g in grids])
        window, _ = self.model.model.visual.get_window_index(thw)
        raster = merged[torch.argsort(window).to(merged.device)]
        return list(raster.split([g.size for g in grids]))

    def places(self, inputs: dict[str, Any]) -> list[list[VideoPlace]]:
        ids, thw = inputs.get("input_ids"), inputs.get("video_grid_thw")
        if ids is None or thw is None:
            return []
        seconds = inputs.get("second_per_grid_ts")
        grids = [self._grid(one) for one in thw]
        rows, video = [], 0
        for row in ids:
            slots = (row == self.placeholder()).nonzero().squeeze(-1)
            places = []
            while slots.numel():
                grid = grids[video]
                step_s = 1.0 if seconds is None else float(seconds[video])
                times = tuple(t * step_s for t in range(grid.frames))
                places.append(VideoPlace(slots[: grid.size], grid, times))
                slots, video = slots[grid.size :], video + 1
            rows.append(places)
        return rows

    def pixel_inputs(self, frames: Sequence[Frame], processor: Any) -> dict[str, Any]:
        video = torch.stack([torch.from_numpy(f.image).permute(2, 0, 1) for f in frames])
        done = processor.video_processor(
            videos=[video], return_tensors="pt", do_sample_frames=False, device=self.model.device
        )
        return {"pixels": done["pixel_values_videos"], "thw": done["video_grid_thw"]}

    def features(self, pixels: dict[str, Any]) -> tuple[Tensor, PatchGrid]:
        thw = pixels["thw"].to(self.model.device)
        values = pixels["pixels"].to(self.model.device, self.model.dtype)
        output = self.model.model.get_video_features(values, thw, return_dict=True)
        return output.pooler_output[0], self._grid(thw[0])

    def placeholder(self) -> int:
        return int(self.model.config.video_token_id)

    def trailing(self) -> Tensor | None:
        return None

    def frames_per_token(self) -> int:
        return int(self.model.config.vision_config.temporal_patch_size)

    def positions(self, input_ids: Tensor, mask: Tensor, grid: PatchGrid) -> Tensor:
        kind = (input_ids == self.placeholder()).int() * 2
        thw = [[grid.frames, grid.rows * self._merge, grid.cols * self._merge]]
        video_thw = torch.tensor(thw * input_ids.shape[0], device=input_ids.device)
        ids, deltas = self.model.model.get_rope_index(
            input_ids, kind, video_grid_thw=video_thw, attention_mask=mask
        )
        self.model.model.rope_deltas = deltas
        text = (mask.long().cumsum(-1) - 1).clamp_min(0)
        return torch.cat([text[None], ids])
