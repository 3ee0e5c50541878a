"""What code makes of Python numbers: made once, so that a capture need not copy from the host."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Constants(TorchFunctionMode):
    """While active, `torch.tensor` of the same numbers gives the same tensor; do not write to it.

    A GPU that is given values of the host is waited for, and a capture fails of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[Hashable, Tensor] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        key = _key(args, kwargs) if func is torch.tensor else None
        if key is None:
            return func(*args, **kwargs)
        if key not in self._made:
            self._made[key] = func(*args, **kwargs)
        return self._made[key]


def _key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable | None:
    """What the tensor of some numbers depends on; None for what is not made of numbers alone."""
    try:
        return _frozen(args), tuple(sorted(kwargs.items()))
    except TypeError:
        return None


def _frozen(values: Any) -> Hashable:
    if isinstance(values, list | tuple):
        return tuple(map(_frozen, values))
    if isinstance(values, bool | int | float):
        return type(values), values
    raise TypeError
