"""What foveate must know about one family of lerobot's flow policies, and nothing more."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from stream.data import PatchGrid
from stream.errors import AttachError
from stream.signals import Signal

from ..probes import Attention
from ..query_rows import ROW_SIGNALS

if TYPE_CHECKING:
    from .flow import FlowPruning


@dataclass(frozen=True, slots=True)
class Seen:
    """The cameras of one batch that gave a picture.

    cameras: their numbers among the policy's; starts: the place of each one's first token in the
    prefix. A missing camera leaves no tokens; `grid` counts it nevertheless.
    """

    cameras: tuple[int, ...]
    starts: tuple[int, ...]
    grid: PatchGrid

    def slots(self, device: torch.device) -> Tensor:
        """long [n]: places of the visual tokens in the prefix."""
        return self._ranges(self.starts, device)

    def index(self, device: torch.device) -> Tensor:
        """long [n]: places of the visual tokens in the grid of all cameras."""
        return self._ranges([c * self.grid.per_frame for c in self.cameras], device)

    @property
    def stop(self) -> int:
        """The place behind the last visual token."""
        return max(self.starts) + self.grid.per_frame

    @property
    def tokens(self) -> int:
        return len(self.cameras) * self.grid.per_frame

    def _ranges(self, starts: Sequence[int], device: torch.device) -> Tensor:
        first = torch.tensor(starts, device=device)[:, None]
        return (first + torch.arange(self.grid.per_frame, device=device)).flatten()


class FlowFamily(ABC):
    """One family of lerobot's flow policies: what its prefix holds, how its layers are reached.

    pictures: name of the policy's method that makes model inputs of a batch's pictures. towers: the
    module that embeds them, one after the other.
    state_in_prefix: whether a prefix has to be prefilled anew to take in a newer state.
    """

    provides: ClassVar[frozenset[Signal]] = ROW_SIGNALS
    """Signals before the model: the attention of its first layer, taken ahead."""

    provides_inside: ClassVar[frozenset[Signal]] = ROW_SIGNALS | {Signal.INPUT_EMBEDDINGS}
    pictures: ClassVar[str]
    towers: Any
    state_in_prefix: ClassVar[bool]

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.model: Any = policy.model

    @property
    @abstractmethod
    def depth(self) -> int:
        """Layers of the prefix."""

    @property
    @abstractmethod
    def side(self) -> int:
        """Visual tokens along one side of a picture."""

    @property
    @abstractmethod
    def flow_steps(self) -> int:
        """Euler steps the policy was configured for."""

    @property
    def framing(self) -> tuple[int, int]:
        """Tokens before and behind each picture, which are attended to even without a picture."""
        return 0, 0

    @property
    def cameras(self) -> tuple[str, ...]:
        """Keys of the policy's cameras, in the order of its configuration."""
        return tuple(self.policy.config.image_features)

    def is_masked(self, batch: dict[str, Any], key: str) -> bool:
        """Whether the batch holds a picture that it declares to be none."""
        return False

    def see(
        self, batch: dict[str, Any], pictures: Sequence[Any], masks: Sequence[Any]
    ) -> tuple[list[Any], list[Any], Seen]:
        """Pictures and masks without the missing cameras, and where the rest will stand.

        Masked pictures are no keys for anybody, so leaving them out changes nothing. Where
        unmasked tokens frame them they stay, and only their tokens are not counted.
        """
        given = [key for key in self.cameras if key in batch]
        there = [i for i, key in enumerate(given) if not self.is_masked(batch, key)]
        if not there:
            raise AttachError(
                f"No camera gave a picture; the policy's cameras are {', '.join(self.cameras)}."
            )
        ahead, behind = self.framing
        each = ahead + self.side**2 + behind
        kept = there if each == self.side**2 else list(range(len(pictures)))
        return (
            [pictures[i] for i in kept],
            [masks[i] for i in kept],
            Seen(
                cameras=tuple(self.cameras.index(given[i]) for i in there),
                starts=tuple(ahead + kept.index(i) * each for i in there),
                grid=PatchGrid(len(self.cameras), self.side, self.side),
            ),
        )

    @abstractmethod
    def attention(self, layer: int, hidden: Tensor, positions: Tensor, mask: Tensor) -> Attention:
        """What a layer of the prefix will compute attention from, by its own projections."""

    @abstractmethod
    def intercept(self, pruning: FlowPruning) -> AbstractContextManager[Any]:
        """While open, the layers of prefix and expert run through `pruning`."""

    @abstractmethod
    def words(self, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        """What stands in the prefix behind the pictures, as `embed` takes it."""

    @abstractmethod
    def embed(
        self, pictures: Sequence[Tensor], masks: Sequence[Tensor], *words: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Prefix embeddings [b, n, d], padding mask and block mask, bool [b, n]."""

    def capturable(self) -> AbstractContextManager[Any]:
        """While open, the policy's own code runs as a graph should: once it has seen pictures of a
        size it asks for no value of a tensor, it copies nothing that stays as it is, and what is
        its family's alone takes few kernels."""
        return nullcontext()

    @abstractmethod
    def entering(
        self, embeds: Tensor, padding: Tensor, blocks: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What enters layer 0, its positions and mask, as `FlowPruning.enter` takes them."""

    @abstractmethod
    def layers(
        self, which: range, hidden: Tensor, positions: Tensor, mask: Tensor, cache: Any
    ) -> Iterator[Tensor]:
        """What leaves each of some layers of the prefix; the cache takes their keys and values."""

    @abstractmethod
    def prefill(self, embeds: Tensor, padding: Tensor, blocks: Tensor) -> Any:
        """The cache of a prefix."""

    def beside(self, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        """What a flow step reads of a batch that is not in the prefix."""
        return ()

    @abstractmethod
    def velocity(
        self, noisy: Tensor, time: Tensor, padding: Tensor, cache: Any, *beside: Tensor
    ) -> Tensor:
        """Of noisy actions [b, chunk, a] at flow times float32 [b], over the cache of a prefix."""

    def finished(self, actions: Tensor) -> Tensor:
        """Actions [b, chunk, a] as the policy's postprocessing expects them."""
        return actions
