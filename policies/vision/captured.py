"""A vision encoder as programs of fixed shape, for numbers of frames that come again."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stream.data import PatchGrid
from stream.signals import Signal

from ..adapter import VideoAdapter
from ..graphs.capture import Program
from ..graphs.kept import Kept, weakly
from ..graphs.standing import Standing

KEPT = 8
"""Shapes of pixels whose programs are kept; the one that was not used for the longest time goes."""


class CapturedEncoder(Standing):
    """`VideoAdapter.encoded` in fewer kernels, captured on CUDA where a shape comes again in
    another request; `encoded` itself where the model is not `ready`.

    Takes about three passes to capture. A call that overlaps another is refused with AttachError.
    """

    def __init__(self, adapter: VideoAdapter, saliency: bool) -> None:
        super().__init__(
            f"The encoder of {type(adapter.model).__name__}",
            lambda: [p for p in adapter.model.model.children() if p is not adapter.text_model],
            adapter.model.device,
        )
        self._adapter, self._saliency = adapter, saliency
        self._grids: dict[tuple[int, ...], PatchGrid] = {}
        self._now: set[tuple[int, ...]] = set()
        self._programs: Kept[tuple[int, ...], Program] = Kept(KEPT)
        self.stand()

    def _rebuild(self) -> None:
        self._features = self._adapter.in_fewer_kernels()

    def _kept(self) -> list[Kept[Any, Any]]:
        return [self._programs]

    def end_request(self) -> None:
        """What was encoded belonged to one request, what comes now belongs to another."""
        self._now.clear()

    def encoded(self, pixels: dict[str, Any]) -> tuple[Tensor, PatchGrid, dict[Signal, Tensor]]:
        """pixels: one tensor, as `VideoAdapter.pixel_inputs` gives it."""
        ((name, values),) = pixels.items()
        values = values.to(self._adapter.model.device, self._adapter.model.dtype)
        if not self.ready():
            return self._adapter.encoded({name: values}, self._saliency)
        shape = tuple(values.shape)
        if shape not in self._grids or shape in self._now:
            x, grid, signals = self._encoded(name, values)
            self._grids[shape] = grid
            self._now.add(shape)
            return x, grid, signals
        with self._alone:
            x, *scores = (made.clone() for made in self._program(name, shape)(values))
        wanted = [Signal.SALIENCY] if self._saliency else []
        return x, self._grids[shape], dict(zip(wanted, scores, strict=True))

    def _program(self, name: str, shape: tuple[int, ...]) -> Program:
        def made() -> Program:
            work = weakly(self._run, name)
            return Program(self.pool, f"The encoder of pixels {shape}", work)

        return self._programs.get(shape, made)

    def _run(self, name: str, values: Tensor) -> tuple[Tensor, ...]:
        x, _, signals = self._encoded(name, values)
        return (x, *signals.values())

    def _encoded(self, name: str, values: Tensor) -> tuple[Tensor, PatchGrid, dict[Signal, Tensor]]:
        return self._adapter.encoded({name: values}, self._saliency, self._features)
