"""Which frames of a stream are worth encoding."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stream.sources.sampling import SAME_TIME_S

BLOCKS = 32
_SAMPLES = 8


class FrameClock:
    """The first frame at or after each wanted time, so that nothing waits for a frame to come.

    fps: wanted times a second, from the first frame's time on.
    """

    def __init__(self, fps: float) -> None:
        self._fps = fps
        self._first_s: float | None = None
        self._last = -1

    def wants(self, pts_s: float) -> bool:
        """pts_s: ascending."""
        if self._first_s is None:
            self._first_s = pts_s
        reached = int((pts_s - self._first_s + SAME_TIME_S) * self._fps)
        wanted, self._last = reached > self._last, max(reached, self._last)
        return wanted


class PixelGate:
    """Lets a frame pass if some block of it changed since the last frame that passed.

    The comparison is with what passed, not with what was seen, so slow drift adds up and is seen;
    and a frame passes after `silence_s` in any case.

    level: grey levels (0 to 255) by which the mean of a block must change; blocks are a 32nd of
        the picture's sides.
    """

    def __init__(self, level: float, silence_s: float) -> None:
        self._level, self._silence_s = level, silence_s
        self._passed: NDArray[np.float32] | None = None
        self._passed_s = 0.0

    def passes(self, image: NDArray[np.uint8], pts_s: float) -> bool:
        """image: uint8 [height, width, 3]; pts_s: ascending."""
        seen = block_means(image)
        before = self._passed
        if (
            before is not None
            and before.shape == seen.shape
            and pts_s - self._passed_s < self._silence_s
            and float(np.abs(seen - before).max()) < self._level
        ):
            return False
        self._passed, self._passed_s = seen, pts_s
        return True

    def reset(self) -> None:
        """The next frame passes."""
        self._passed = None


def block_means(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """float32 [rows, cols, 3]: mean colors of at most 32 x 32 blocks, from at most 8 x 8 pixels of
    each."""
    step = [max(1, side // (BLOCKS * _SAMPLES)) for side in image.shape[:2]]
    few = image[:: step[0], :: step[1]]
    block = [max(1, -(-side // BLOCKS)) for side in few.shape[:2]]
    starts = [np.arange(0, side, b) for side, b in zip(few.shape[:2], block, strict=True)]
    sums = np.add.reduceat(few.astype(np.float32), starts[0], axis=0)
    sums = np.add.reduceat(sums, starts[1], axis=1)
    sizes = [np.diff([*start, side]) for start, side in zip(starts, few.shape[:2], strict=True)]
    return np.asarray(sums / np.multiply.outer(*sizes)[..., None], np.float32)
