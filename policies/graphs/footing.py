"""What captured programs stand on: the modules of a network, and where their weights lie."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from itertools import repeat
from operator import attrgetter, contains
from typing import Any

from torch import Tensor, nn

HARMLESS = ("transformers.utils.output_capturing", "policies.vision.layout")
"""Whose hooks a replay may leave out. Those of transformers stay for good once hidden states were
asked for, and do nothing when they are not; that of `layout` is captured with the rest."""


def hooked(module: nn.Module) -> bool:
    """Whether something else than its own forward runs when it is called."""
    both = (module._forward_hooks, module._forward_pre_hooks)
    return any(map(_at_work, both)) or "forward" in module.__dict__


class Footing:
    """A network as `note` found it. Replays read weights where they lay then, joined products are
    of the layers that were there then.

    roots: gives its modules, as they are now, with all below them. devices: where its weights,
    parameters and buffers, were when it was noted.
    """

    def __init__(self, roots: Callable[[], Iterable[nn.Module]]) -> None:
        self._find = roots
        self.note()

    def note(self) -> None:
        """The network as it is now is the one that programs stand on."""
        self._roots = list(self._find())
        modules = list(dict.fromkeys(each for root in self._roots for each in root.modules()))
        self._owners: list[dict[str, Any]] = [
            owned for each in modules for owned in (each._parameters, each._buffers) if owned
        ]
        self._parents = [each._modules for each in modules if each._modules]
        self._children = self._children_now()
        own = self._weights()
        self._places = _places(own)
        self.devices = {weight.device for weight in own}
        self._hooks = [
            hooks for each in modules for hooks in (each._forward_hooks, each._forward_pre_hooks)
        ]
        self._replaced = [each.__dict__ for each in modules]

    def holds(self) -> bool:
        """Whether nothing was replaced, moved or converted since. Costs about 0.2 us a parameter,
        so ask once for each answer or inference."""
        return (
            self._roots == list(self._find())
            and self._children == self._children_now()
            and self._places == _places(self._weights())
        )

    @property
    def is_plain(self) -> bool:
        """Whether it lies on one device, and no module of it has a hook or another forward: a
        replay runs neither."""
        replaced = any(map(contains, self._replaced, repeat("forward")))
        hooked = any(map(_at_work, filter(None, self._hooks)))
        return len(self.devices) == 1 and not replaced and not hooked

    def _children_now(self) -> list[nn.Module | None]:
        return [child for children in self._parents for child in children.values()]

    def _weights(self) -> list[Tensor]:
        return [each for owned in self._owners for each in owned.values() if each is not None]


def _at_work(hooks: Mapping[int, Callable[..., Any]]) -> bool:
    return any(getattr(hook, "__module__", None) not in HARMLESS for hook in hooks.values())


def _places(own: list[Any]) -> tuple[list[Hashable], list[Hashable]]:
    """Where weights lie, or which they are where they have no memory of their own; dtypes."""
    try:
        places: list[Hashable] = list(map(Tensor.data_ptr, own))
    except RuntimeError:
        places = list(map(id, own))
    return places, list(map(attrgetter("dtype"), own))
