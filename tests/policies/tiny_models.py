"""Tiny random models of the supported families, built from configs with a fixed seed."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

VIDEO_ID, IMAGE_ID = 190, 191
TEXT = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


def llava_onevision() -> Any:
    torch.manual_seed(0)
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **TEXT},
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 40,
            "patch_size": 8,
            "vision_use_head": False,
        },
        video_token_id=VIDEO_ID,
        image_token_id=IMAGE_ID,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[40, 40]],
    )
    return LlavaOnevisionForConditionalGeneration(config).eval()


def llava_inputs(batch: int = 1, frames: int = 4, suffix: int = 6) -> dict[str, torch.Tensor]:
    """A 3 x 3 pooled grid for each frame, one trailing newline."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(5, 180, (batch, 3 + suffix), generator=generator)
    video = torch.full((batch, frames * 9 + 1), VIDEO_ID)
    ids = torch.cat([text[:, :3], video, text[:, 3:]], 1)
    pixels = torch.randn(batch, frames, 3, 40, 40, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": pixels,
    }


def qwen2_5_vl() -> Any:
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [2, 3, 3],
                "rope_theta": 10000.0,
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 64,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        vision_start_token_id=192,
        vision_end_token_id=193,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen_inputs(batch: int = 1, frames: int = 4) -> dict[str, torch.Tensor]:
    """`frames` temporal patches of a 3 x 4 merged grid, between vision start and end."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(5, 180, (batch, 8), generator=generator)
    text[:, 2:4] = torch.tensor([192, 193])
    video = torch.full((batch, frames * 12), VIDEO_ID)
    ids = torch.cat([text[:, :3], video, text[:, 3:]], 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": torch.randn(
            batch * frames * 6 * 8, 3 * 2 * 4 * 4, generator=generator
        ),
        "video_grid_thw": torch.tensor([[frames, 6, 8]] * batch),
        "mm_token_type_ids": (ids == VIDEO_ID).int() * 2,
    }
