"""A folder of images, or one image, as a source.

Images are taken in natural order of their names (2.png before 10.png), one for each second.
Each keeps its own size. Transparency is laid on black; 16-bit grey is scaled to 8.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from stream.data import Frame
from stream.errors import SourceError

from .base import (
    IMAGE_SUFFIXES,
    DecodeReport,
    Source,
    SourceInfo,
    Tally,
    check_start,
    reason_of,
    refuse_oversize,
)
from .sampling import Sampling, Uniform

if TYPE_CHECKING:
    from numpy.typing import NDArray

IMAGE_PERIOD_S = 1.0
"""Images carry no clock: the n-th one is shown at n * IMAGE_PERIOD_S."""


class ImageFolder(Source):
    """The images directly in `folder`; folders in it are not entered."""

    def __init__(self, folder: Path) -> None:
        try:
            files = [file for file in folder.iterdir() if file.is_file()]
        except OSError as error:
            raise SourceError(
                f"{folder} cannot be listed: {reason_of(error)}; "
                "ask for read permission (chmod u+rx)."
            ) from None
        images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        if not images:
            raise SourceError(
                f"{folder} is a folder with no images among its {len(files)} files "
                f"({', '.join(IMAGE_SUFFIXES)} count); give a folder of images, or one video file."
            )
        images.sort(key=lambda file: natural_key(file.name))
        self._open(str(folder), images, len(files) - len(images))

    @classmethod
    def single(cls, image: Path) -> ImageFolder:
        """One image file as a source of one frame."""
        source = cls.__new__(cls)
        source._open(str(image), [image], 0)
        return source

    def _open(self, name: str, images: list[Path], left_out: int) -> None:
        self._images = images
        self._left_out = left_out
        self._tally = Tally("image files")
        self._info = self._probe(name)

    @property
    def info(self) -> SourceInfo:
        """width and height are those of the first image that can be opened."""
        return self._info

    @property
    def report(self) -> DecodeReport:
        return self._tally.report()

    def read(self, sampling: Sampling, start: int = 0) -> Iterator[Frame]:
        """See `Source.read`. Frame.index is the image's place in the order of names.

        An image that cannot be read is counted and left out; another does not take its place.
        """
        self._tally = Tally("image files")
        return self._read(sampling, check_start(start), self._tally)

    def close(self) -> None:
        """Nothing is held open between images."""

    def _read(self, sampling: Sampling, start: int, tally: Tally) -> Iterator[Frame]:
        pts_s = np.arange(len(self._images), dtype=np.float64) * np.float64(IMAGE_PERIOD_S)
        wanted = sampling.pick(pts_s)
        if self._left_out:
            tally.notes.append(f"files left out, not images: {self._left_out}")
        if isinstance(sampling, Uniform) and len(wanted) < sampling.frames:
            tally.notes.append(f"{sampling.frames} frames asked for, there are {len(wanted)}")
        position = 0
        for index in wanted.tolist():
            try:
                image = read_image(self._images[index])
            except _IMAGE_ERRORS as error:
                tally.fail(_reason(self._images[index], error))
                continue
            tally.frames_decoded += 1
            if position >= start:
                tally.frames_given += 1
                yield Frame(image, float(pts_s[index]), index)
            position += 1
        if tally.frames_decoded == 0:
            raise SourceError(
                f"{self._info.name}: not one of {len(wanted)} images can be read "
                f"({'; '.join(tally.errors)}); get them again."
            )

    def _probe(self, name: str) -> SourceInfo:
        count = len(self._images)
        reasons = []
        for file in self._images:
            try:
                with Image.open(file) as image:
                    width, height = image.size
                    refuse_oversize(file.name, width, height)
                    turns = _EXIF_TURNS.get(image.getexif().get(_EXIF_ORIENTATION, 1), 0)
                    codec = (image.format or "").lower()
            except _IMAGE_ERRORS as error:
                reasons.append(_reason(file, error))
                continue
            if turns % 2:
                width, height = height, width
            return SourceInfo(
                name,
                width,
                height,
                count * IMAGE_PERIOD_S,
                count,
                1 / IMAGE_PERIOD_S,
                codec,
                90 * turns,
            )
        raise SourceError(
            f"{name}: not one of {count} images can be opened ({'; '.join(reasons[:3])}); "
            "get them again."
        )


_IMAGE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError, SourceError)
_EXIF_ORIENTATION = 0x0112
_EXIF_TURNS = {3: 2, 4: 2, 5: 1, 6: 1, 7: 3, 8: 3}


def read_image(file: Path) -> NDArray[np.uint8]:
    """uint8 [height, width, 3], RGB, upright. Raises one of `_IMAGE_ERRORS`."""
    with Image.open(file) as image:
        refuse_oversize(file.name, *image.size)
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):
            grey = (np.asarray(upright).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
        if upright.has_transparency_data:
            clear = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", clear.size, (0, 0, 0, 255)), clear)
        return np.array(upright.convert("RGB"))


def natural_key(name: str) -> tuple[list[tuple[int, int | str]], str]:
    """Sorts digits in a name by their value: frame2 before frame10."""
    parts = re.split(r"(\d+)", name.casefold())
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts if part], name


def _reason(file: Path, error: BaseException) -> str:
    if isinstance(error, SourceError):
        return str(error)
    what = "not an image" if isinstance(error, UnidentifiedImageError) else reason_of(error)
    return f"{file.name}: {what}"
