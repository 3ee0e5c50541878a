"""The lean expert of flow policies: what the plain one says, with less work and fewer kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from foveate.timing import shapes
from foveate.timing.flow import FlowSubject
from foveate.timing.flow_lean import LeanExpert

MODELS = ("tiny-smolvla", "tiny-pi0", "tiny-pi05")
Prefix = tuple[list[Tensor], list[Tensor]]


def parts(
    model: str, batch: int = 1, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[FlowSubject, tuple[Tensor, Tensor], Prefix]:
    """A subject, noise and state, and the cache of a prefix that shrinks from layer to layer."""
    one = shapes.flow_subject(model, 3, device, dtype)
    config: Any = one.text_model.config
    generator = torch.Generator().manual_seed(1)
    keys, values = (
        [
            torch.randn(
                batch, config.num_key_value_heads, 20 - i, config.head_dim, generator=generator
            ).to(device, dtype)
            for i in range(config.num_hidden_layers)
        ]
        for _ in range(2)
    )
    given = one.noise.expand(batch, -1, -1), one.state.expand(batch, -1)
    return one, given, (keys, values)


class Operators(TorchDispatchMode):
    """Counts operators that compute, not those that only look at a tensor otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("batch", [1, 2])
def test_it_says_the_same(model: str, batch: int) -> None:
    one, given, prefix = parts(model, batch, torch.float64)
    expected = one.actions(*given, *prefix)
    said = LeanExpert(one)(*given, *prefix)
    torch.testing.assert_close(said, expected, atol=1e-6, rtol=0)
    assert torch.equal(one.actions(*given, *prefix), expected)
    assert (said - given[0]).abs().max() > 0.1


@torch.inference_mode()
@pytest.mark.parametrize("model", MODELS)
def test_it_takes_less_than_two_thirds_of_the_operators(model: str) -> None:
    """Fewer still on CUDA, where sums and norms, rotations and gates are one kernel each."""
    one, given, prefix = parts(model)
    lean = LeanExpert(one)
    with Operators() as stock:
        one.actions(*given, *prefix)
    with Operators() as fewer:
        lean(*given, *prefix)
    assert fewer.count < stock.count * 2 / 3


@torch.no_grad()
@pytest.mark.parametrize("model", MODELS)
def test_operations_are_counted_as_they_are_done(model: str) -> None:
    one, given, prefix = parts(model)
    seen = [key.shape[2] for key in prefix[0]]
    shape, layers = one.expert.shape, one.expert.layers
    rows: list[Any] = list(zip(seen, layers, strict=True))
    steps, chunk, first = shape.steps, shape.chunk, shape.first

    def attention(new: int, others: int) -> int:
        """Of `new` rows that see the prefix, and `others` in joint layers."""
        looks = ((n + others * layer.joint) * layer.out.in_features for n, layer in rows)
        return 4 * new * sum(looks)

    by_step = steps * attention(first + chunk, first + chunk)
    at_once = attention(first, first) + steps * attention(chunk, first + chunk)
    for act, once, looked in ((one.actions, False, by_step), (LeanExpert(one), True, at_once)):
        with FlopCounterMode(display=False) as counter:
            act(*given, *prefix)
        counted = counter.get_flop_counts()["Global"]
        products = counted[torch.ops.aten.mm] + counted[torch.ops.aten.addmm]
        assert one.action_flops(seen, once) == products + looked
    assert one.action_flops(seen, once=True) < one.action_flops(seen)


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("model", MODELS)
def test_on_cuda_it_says_the_same(model: str) -> None:
    one, given, prefix = parts(model, device="cuda")
    expected = one.actions(*given, *prefix)
    torch.testing.assert_close(LeanExpert(one)(*given, *prefix), expected, atol=1e-4, rtol=0)
