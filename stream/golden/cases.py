"""What one golden case is, and how arrays are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Arrays = Mapping[str, NDArray[Any]]
Verdict = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True, slots=True)
class Case:
    """One golden case: passed, failed with the reason, or skipped because the reference itself
    is unstable there (counts are still compared)."""

    name: str
    verdict: Verdict
    why: str = ""


def fitting(name: str, check: Callable[[], list[Case]]) -> list[Case]:
    """The cases, or a failed one if arrays are missing or of shapes that contradict each other."""
    try:
        return check()
    except (KeyError, ValueError, IndexError, TypeError, RuntimeError) as error:
        why = f"does not fit the format: {type(error).__name__}: {error}"
        return [Case(name, "failed", why)]


@contextmanager
def one_thread() -> Iterator[None]:
    """For thousands of small operators, which cost less than handing them out to threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def tensor(array: NDArray[Any]) -> Tensor:
    """A torch copy; stored int16 positions become long."""
    copy = torch.from_numpy(np.array(array))
    return copy if copy.is_floating_point() else copy.long()


def differs(
    what: str, ours: Tensor, golden: NDArray[Any], rtol: float = 0.0, atol: float = 0.0
) -> str:
    """'' where equal, else the reason; a reason that begins with 'count' is a wrong shape."""
    expected = tensor(golden)
    if ours.shape != expected.shape:
        return f"count of {what}: {tuple(ours.shape)}, expected {tuple(expected.shape)}"
    ours, expected = ours.double(), expected.double()
    if torch.allclose(ours, expected, rtol=rtol, atol=atol):
        return ""
    return f"{what} differ by up to {float((ours - expected).abs().max()):.2e}"
