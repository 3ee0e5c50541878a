"""Another order in memory: the same features to the bit, and the model as it was."""

from __future__ import annotations

import pytest
import torch

from policies.video.llava_onevision import Adapter
from policies.vision.siglip import SiglipParts

from ..tiny_models import llava_onevision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_those_of_transformers(dtype: torch.dtype) -> None:
    adapter = Adapter(llava_onevision().to(dtype))
    pixels = {"pixel_values": torch.randn(1, 3, 3, 40, 40)}
    with torch.inference_mode():
        mine, grid = adapter.features(pixels)
        stock, _ = adapter.stock_features(pixels)
    assert mine.shape == (grid.size, stock.shape[1])
    assert stock.std() > 0
    assert torch.equal(mine, stock)


def test_the_model_is_left_as_it_was() -> None:
    adapter = Adapter(llava_onevision())
    adapter.features({"pixel_values": torch.randn(1, 2, 3, 40, 40)})
    assert "apply_pooling" not in vars(adapter.model.model)
    assert not adapter.vision_model.vision_model.embeddings._forward_hooks


def test_embedded_patches_lie_row_after_row() -> None:
    embedded = SiglipParts(Adapter(llava_onevision()).vision_model).embed(torch.randn(2, 3, 40, 40))
    assert embedded.is_contiguous()
