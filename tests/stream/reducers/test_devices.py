"""Every reducer decides on a GPU as it does on a CPU."""

from __future__ import annotations

import pytest
import torch

from stream.check import Scene
from stream.data import Budget, PatchGrid, VisualTokens
from stream.memory import Memory
from stream.reducers.base import reduce_stage
from stream.registry import build_reducer, reducer_names
from stream.signals import Signals


@pytest.mark.gpu
@pytest.mark.parametrize("name", reducer_names())
def test_a_gpu_decides_like_a_cpu(name: str) -> None:
    scenes = [Scene(PatchGrid(6, 4, 5), look, salt=i) for i, look in enumerate(("moving", "still"))]
    for stage in build_reducer(name).stages:
        plans = []
        for device in ("cpu", "cuda"):
            memory = Memory()
            for scene in scenes:  # two ticks, for those that remember
                t = scene.tokens()
                tokens = VisualTokens(t.x.to(device), t.index.to(device), t.grid, t.pts_s)
                signals = Signals({s: v.to(device) for s, v in scene.signals().items()})
                plan = reduce_stage(stage, tokens, signals, Budget(30), memory)
                memory.tick += 1
                assert plan.apply(tokens.x).device.type == device
            plans.append(plan.to("cpu"))
        assert torch.equal(plans[0].anchor, plans[1].anchor)
        assert torch.allclose(plans[0].dense(), plans[1].dense(), atol=1e-5)
