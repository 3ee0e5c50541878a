"""What gets installed, and that it is what gets imported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import foveate
import policies
import sims
import stream

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("foveate", "stream", "policies", "sims")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_one_root_for_all_packages() -> None:
    roots = {
        Path(p.__file__ or "").resolve().parent.parent for p in (foveate, stream, policies, sims)
    }
    assert roots == {ROOT}


def test_the_installed_packages_are_ours_outside_the_repository_too(tmp_path: Path) -> None:
    """A distribution called `stream` in site-packages would win everywhere but in the root."""
    code = (
        f"import {', '.join(PACKAGES)}; print(*({', '.join(f'{p}.__file__' for p in PACKAGES)},))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout.split()
    assert {Path(f).resolve().parent.parent for f in found} == {ROOT}


def test_metadata() -> None:
    assert tuple(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == PACKAGES
    assert "Private :: Do Not Upload" in PROJECT["project"]["classifiers"]
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert (ROOT / ".python-version").read_text().strip() == "3.12"


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").is_file()]


def test_the_wheel_holds_the_packages_and_nothing_else(tmp_path: Path) -> None:
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not on the path")
    build = subprocess.run(
        [uv, "build", "--wheel", "--offline", "--quiet", "--out-dir", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "hatchling" in build.stderr and build.returncode:
        pytest.skip("hatchling is not in uv's cache, and tests use no network")
    assert build.returncode == 0, build.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {t for t in top if not t.endswith(".dist-info")} == set(PACKAGES)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    weights = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("policies/**/*.safetensors")}
    other_seeds = {path for path in weights if path.startswith("policies/checkpoints/seeds/")}
    assert weights - other_seeds <= set(names)
    assert not other_seeds & set(names)
