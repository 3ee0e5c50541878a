"""Compare our operators with stored outputs of a method's reference implementation.

A golden file is an .npz whose arrays hold inputs and expected outputs of named cases. Which method
and which cases a file holds is read from its array names, so any folder of a known format works.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from ..errors import SourceError
from . import holitom, vla_pruner
from .cases import Case, Verdict, one_thread

__all__ = ["Case", "Verdict", "check_folder"]

_UNKNOWN = Case("file", "skipped", "holds no case of a known kind")


def check_folder(folder: Path) -> dict[str, list[Case]]:
    """Check every golden file of a folder: file name -> its cases.

    Raises SourceError if the folder is missing or holds no file of a known format.
    """
    if not folder.is_dir():
        raise SourceError(f"'{folder}' is not a folder; give one that holds golden .npz files.")
    results = {path.name: _check_file(path) for path in sorted(folder.glob("*.npz"))}
    if all(cases == [_UNKNOWN] for cases in results.values()):
        raise SourceError(
            f"'{folder}' holds no golden file; .npz files with the cases of HoliTom or of "
            "VLA-Pruner are needed."
        )
    return results


def _check_file(path: Path) -> list[Case]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error) as error:
        return [Case("file", "failed", f"cannot be read: {error}")]
    with one_thread():
        return holitom.cases(arrays) + vla_pruner.cases(arrays) or [_UNKNOWN]
