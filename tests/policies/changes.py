"""What users do to a network between two of its calls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Change = Callable[[nn.Module], None]
"""Of a network, the same for two that are alike."""


class Adapted(nn.Module):
    """As LoRA puts one around a projection."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.more = nn.Linear(base.in_features, base.out_features).to(base.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.more(x)
        return out


def assigned(network: nn.Module) -> None:
    """Other weights, in other places."""
    network.load_state_dict(
        {name: weight * 1.25 for name, weight in network.state_dict().items()}, assign=True
    )


def overwritten(network: nn.Module) -> None:
    """Other weights, in the same places."""
    network.load_state_dict({name: weight * 1.25 for name, weight in network.state_dict().items()})


def adapted(network: nn.Module) -> None:
    """Adapters around all queries."""
    torch.manual_seed(5)
    for name, module in list(network.named_modules()):
        if name.endswith("q_proj"):
            parent = network.get_submodule(name.rpartition(".")[0])
            assert isinstance(module, nn.Linear)
            parent.q_proj = Adapted(module)


def moved(network: nn.Module) -> None:
    """The same weights in other places, and others where they were."""
    for weight in network.parameters():
        before = weight.data
        weight.data = before.clone()
        before.fill_(100.0)


@contextmanager
def hooked(network: nn.Module, name: str) -> Iterator[list[int]]:
    """A hook that changes what a module says; the list grows as it runs."""
    ran: list[int] = []

    def hook(module: Any, given: Any, said: Any) -> Any:
        ran.append(1)
        return said.flip(-1)

    handle = network.get_submodule(name).register_forward_hook(hook)
    try:
        yield ran
    finally:
        handle.remove()


@contextmanager
def replaced_forward(network: nn.Module, name: str) -> Iterator[list[int]]:
    """The same by another forward."""
    module: Any = network.get_submodule(name)
    ran: list[int] = []
    run = copy.copy(module.forward)

    def forward(*given: Any, **named: Any) -> Any:
        ran.append(1)
        return run(*given, **named).flip(-1)

    module.forward = forward
    try:
        yield ran
    finally:
        del module.forward
