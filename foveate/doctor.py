"""What this machine has and lacks for foveate, and what to do about it. Looks, changes nothing.

Nothing heavy is imported unless it must be: torch only where an NVIDIA driver is present.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GIB = 1 << 30


class Status(StrEnum):
    """OK: there. LIMITED: foveate runs without it, with less. MISSING: foveate needs it."""

    OK = "ok"
    LIMITED = "limited"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at: what was found, and what to install or do when it is not ok."""

    name: str
    status: Status
    detail: str
    advice: str = ""


Verdict = tuple[Status, str, str]


def examine() -> list[Finding]:
    """Every finding, in a fixed order; never raises. Takes seconds, most of them torch's import."""
    return [_guarded(name, check) for name, check in CHECKS.items()]


def _guarded(name: str, check: Callable[[], Verdict]) -> Finding:
    try:
        return Finding(name, *check())
    except Exception as error:
        problem = f"the check itself failed: {type(error).__name__}: {error}"
        return Finding(name, Status.LIMITED, problem, "Please report this.")


def _ok(detail: str) -> Verdict:
    return Status.OK, detail, ""


def _python() -> Verdict:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] == (3, 12):
        return _ok(f"{version} at {sys.executable}")
    return Status.MISSING, f"{version}; 3.12 is needed", "uv python install 3.12 && uv sync"


def _packages() -> Verdict:
    """Whether foveate's four packages are the ones beside this file."""
    strangers = []
    for name in ("stream", "policies", "sims"):
        spec = importlib.util.find_spec(name)
        where = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if where != ROOT / name:
            strangers.append((name, where))
    if not strangers:
        return _ok(f"foveate, stream, policies and sims all come from {ROOT}")
    owners = importlib.metadata.packages_distributions()
    detail = "; ".join(
        f"{name!r} comes from {where}" if where else f"{name!r} is not importable"
        for name, where in strangers
    )
    others = {d for name, where in strangers if where for d in owners.get(name, [])} - {"foveate"}
    if others:
        detail += f": the distribution {', '.join(sorted(others))} shadows it"
        remedy = f"uv pip uninstall {' '.join(sorted(others))}"
    else:
        remedy = "uv sync"
    return Status.MISSING, detail, f"{remedy}, or run from {ROOT}"


def _dependencies() -> Verdict:
    try:
        required = importlib.metadata.requires("foveate") or []
    except importlib.metadata.PackageNotFoundError:
        return Status.LIMITED, "foveate itself is not installed", f"cd {ROOT} && uv sync"
    names = [
        re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in required if "extra ==" not in line
    ]
    lacking = [name for name in names if _version(name) is None]
    if lacking:
        return Status.MISSING, f"not installed: {', '.join(lacking)}", f"cd {ROOT} && uv sync"
    return _ok(f"all {len(names)} are installed")


def _torch() -> Verdict:
    version = _version("torch")
    if version is None or importlib.util.find_spec("torch") is None:
        return Status.MISSING, "torch is not installed", f"cd {ROOT} && uv sync"
    return _ok(f"torch {version}")


def _gpu() -> Verdict:
    if not _loads("libcuda.so.1"):
        less = "Everything runs on the CPU; models of 7B parameters need a GPU."
        return Status.LIMITED, "no NVIDIA driver (libcuda.so.1)", less
    torch = _imported("torch")
    if isinstance(torch, str):
        return Status.MISSING, torch, f"cd {ROOT} && uv sync --reinstall-package torch"
    if not torch.cuda.is_available():
        advice = "Update the driver, or check CUDA_VISIBLE_DEVICES; `nvidia-smi` says what it sees."
        build = torch.version.cuda or "no CUDA at all"
        return Status.LIMITED, f"a driver, but torch (built for {build}) finds no device", advice
    devices = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        name = torch.cuda.get_device_name(i)
        devices.append(f"cuda:{i} {name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free")
    return _ok("; ".join(devices))


def _cpu() -> Verdict:
    threads = len(os.sched_getaffinity(0))
    quota = _read(Path("/sys/fs/cgroup/cpu.max")).split()
    limit = int(quota[0]) / int(quota[1]) if len(quota) == 2 and quota[0] != "max" else threads
    usable = min(float(threads), limit)
    detail = f"{usable:g} threads" if usable == threads else f"{usable:g} of {threads} threads"
    if usable < 2:
        return (
            Status.LIMITED,
            detail,
            "Give the machine or container 2 CPUs; Ray actors share them.",
        )
    return _ok(detail)


def _shared_memory() -> Verdict:
    """Frames cross between Ray actors through /dev/shm."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return Status.LIMITED, "no /dev/shm; Ray will use the disk, slowly", "Use --runner inline."
    total = shutil.disk_usage(path).total
    detail = f"{total / GIB:.1f} GiB in /dev/shm"
    if total < GIB:
        return Status.LIMITED, detail, "In Docker: --shm-size=2g. Otherwise --runner inline."
    return _ok(detail)


def _disk() -> Verdict:
    places = {Path.cwd(), Path(tempfile.gettempdir())}
    free, place = min((shutil.disk_usage(p).free, str(p)) for p in places)
    detail = f"{free / GIB:.1f} GiB free at {place}"
    if free < 5 * GIB:
        return Status.LIMITED, detail, "Free some space: runs, Ray's spill and caches need 5 GiB."
    return _ok(detail)


def _pyav() -> Verdict:
    av = _imported("av")
    if isinstance(av, str):
        return Status.MISSING, av, f"cd {ROOT} && uv sync"
    lacking = []
    for name, mode in (("h264", "r"), ("hevc", "r"), ("libx264", "w")):
        try:
            av.Codec(name, mode)
        except ValueError:
            lacking.append(f"{name} {'decoder' if mode == 'r' else 'encoder'}")
    detail = f"PyAV {_version('av')}"
    if lacking:
        advice = "Install PyAV from its wheel: uv pip install --reinstall --only-binary av av"
        return Status.LIMITED, f"{detail} without {', '.join(lacking)}", advice
    return _ok(f"{detail} reads h264 and hevc, writes h264")


def _decord() -> Verdict:
    decord = _imported("decord")
    if isinstance(decord, str):
        return Status.LIMITED, decord, "Only --decoder decord needs it; PyAV is the default."
    return _ok(f"decord {_version('decord')}")


def _ray() -> Verdict:
    ray = _imported("ray")
    if isinstance(ray, str):
        return Status.LIMITED, ray, f"cd {ROOT} && uv sync; until then --runner inline works."
    return _ok(f"Ray {_version('ray')}")


def _ffmpeg() -> Verdict:
    path = shutil.which("ffmpeg")
    if path is None:
        return (
            Status.LIMITED,
            "no ffmpeg command",
            "Optional (PyAV has its own): apt install ffmpeg",
        )
    return _ok(path)


def _opengl() -> Verdict:
    """Simulators render through EGL and GL; EGL alone is not enough."""
    debian = {"libEGL.so.1": "libegl1", "libGL.so.1": "libgl1"}
    lacking = [name for name in debian if not _loads(name)]
    if lacking:
        packages = " ".join(debian[name] for name in lacking)
        advice = f"For simulators with pictures: apt install {packages}"
        return Status.LIMITED, f"no {' and no '.join(lacking)}", advice
    return _ok("libEGL and libGL load")


def _rerun() -> Verdict:
    if importlib.util.find_spec("rerun") is None:
        return Status.LIMITED, "rerun is not installed", "Optional: uv pip install rerun-sdk"
    return _ok(f"rerun {_version('rerun-sdk')}")


def _checkpoints() -> Verdict:
    folder = ROOT / "policies" / "checkpoints"
    files = sorted(folder.rglob("*.safetensors"))
    broken = [str(f.relative_to(folder)) for f in files if not _is_whole(f)]
    advice = "git checkout -- policies/checkpoints"
    if broken:
        return Status.MISSING, f"cut short or no safetensors: {', '.join(broken)}", advice
    if not files:
        return Status.MISSING, f"no model in {folder}", advice
    names = sorted({f.parent.name for f in files})
    size = sum(f.stat().st_size for f in files) / (1 << 20)
    return _ok(f"{', '.join(names)} ({size:.0f} MiB)")


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its own header says."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < path.stat().st_size else {}
        ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return path.stat().st_size == 8 + length + max(ends, default=0)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _imported(name: str) -> Any:
    """The module, or in words why it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        return f"{name} cannot be imported: {error}"
    except OSError as error:
        return f"{name} lacks a system library: {error}"


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


CHECKS: dict[str, Callable[[], Verdict]] = {
    "Python": _python,
    "packages": _packages,
    "dependencies": _dependencies,
    "torch": _torch,
    "GPU": _gpu,
    "CPU": _cpu,
    "shared memory": _shared_memory,
    "disk": _disk,
    "video (PyAV)": _pyav,
    "video (decord)": _decord,
    "Ray": _ray,
    "ffmpeg": _ffmpeg,
    "OpenGL": _opengl,
    "rerun": _rerun,
    "checkpoints": _checkpoints,
}
