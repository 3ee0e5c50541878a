"""The doctor on this machine, and on machines that lack things."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import time
from collections import namedtuple
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from foveate import doctor
from foveate.doctor import Finding, Status, examine

Usage = namedtuple("Usage", "total used free")


def finding(name: str) -> Finding:
    return next(f for f in examine() if f.name == name)


def test_every_check_reports_in_time() -> None:
    start = time.perf_counter()
    findings = examine()
    assert time.perf_counter() - start < 15
    assert [f.name for f in findings] == list(doctor.CHECKS)
    assert all(f.detail for f in findings)
    assert all(bool(f.advice) == (f.status is not Status.OK) for f in findings)
    assert not any("check itself failed" in f.detail for f in findings)


def test_torch_stays_out_without_a_driver() -> None:
    code = (
        "import sys, foveate.doctor as d; d._loads = lambda name: False; d.examine();"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=doctor.ROOT, timeout=60).returncode == 0


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("no luck")

    monkeypatch.setitem(doctor.CHECKS, "CPU", broken)
    assert finding("CPU").detail == "the check itself failed: RuntimeError: no luck"


def test_another_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 13, 1))
    assert finding("Python").status is Status.MISSING
    assert "3.12" in finding("Python").advice


def test_a_foreign_package_that_shadows_ours_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = importlib.util.find_spec
    foreign = ModuleSpec("stream", None, origin=str(tmp_path / "stream" / "__init__.py"))

    def find_spec(name: str) -> ModuleSpec | None:
        return {"stream": foreign, "sims": None}.get(name, real(name))

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(
        importlib.metadata, "packages_distributions", lambda: {"stream": ["stream-python"]}
    )
    found = finding("packages")
    assert found.status is Status.MISSING
    assert f"'stream' comes from {tmp_path / 'stream'}" in found.detail
    assert "'sims' is not importable" in found.detail
    assert "distribution stream-python shadows it" in found.detail
    assert found.advice.startswith("uv pip uninstall stream-python")


def test_dependencies_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda name: ["numpy>=2", "no-such-thing[x]==1"]
    )
    assert finding("dependencies").detail == "not installed: no-such-thing"


def test_missing_libraries_name_debian_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_loads", lambda name: False)
    assert finding("OpenGL").advice.endswith("apt install libegl1 libgl1")
    monkeypatch.setattr(doctor, "_loads", lambda name: "EGL" in name)
    assert finding("OpenGL").advice.endswith("apt install libgl1")
    assert finding("GPU").status is Status.LIMITED


@pytest.mark.parametrize("available", [True, False])
def test_gpu_with_a_driver(monkeypatch: pytest.MonkeyPatch, available: bool) -> None:
    cuda = SimpleNamespace(
        is_available=lambda: available,
        device_count=lambda: 2,
        mem_get_info=lambda i: (3 << 30, 4 << 30),
        get_device_name=lambda i: "Quick 4000",
    )
    fake = SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="13.0"))
    monkeypatch.setattr(doctor, "_loads", lambda name: True)
    monkeypatch.setitem(sys.modules, "torch", fake)  # type: ignore[arg-type]
    found = finding("GPU")
    if available:
        assert found.detail.endswith("cuda:1 Quick 4000, 3.0 of 4.0 GiB free")
    else:
        assert found.status is Status.LIMITED
        assert "built for 13.0" in found.detail


def test_optional_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "decord", None)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert finding("ffmpeg").status is Status.LIMITED
    assert finding("video (decord)").status is Status.LIMITED
    assert "--runner inline" in finding("Ray").advice


def test_pyav_without_codecs(monkeypatch: pytest.MonkeyPatch) -> None:
    def codec(name: str, mode: str) -> None:
        if name != "h264":
            raise ValueError(name)

    monkeypatch.setitem(sys.modules, "av", SimpleNamespace(Codec=codec))  # type: ignore[arg-type]
    assert "without hevc decoder, libx264 encoder" in finding("video (PyAV)").detail


def test_little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage(64 << 20, 0, 1 << 20))
    assert finding("disk").status is Status.LIMITED
    assert "--shm-size" in finding("shared memory").advice


@pytest.mark.parametrize(
    ("quota", "detail"), [("150000 100000", "1.5 of 4 threads"), ("max 100000", "4 threads")]
)
def test_container_quota_limits_threads(
    monkeypatch: pytest.MonkeyPatch, quota: str, detail: str
) -> None:
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(doctor, "_read", lambda path: quota)
    assert finding("CPU").detail == detail


def write_safetensors(path: Path, missing_bytes: int = 0) -> None:
    header = json.dumps({"w": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8 - missing_bytes))


def test_checkpoints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    assert finding("checkpoints").status is Status.MISSING

    folder = tmp_path / "policies" / "checkpoints" / "small"
    write_safetensors(folder / "model.safetensors")
    assert finding("checkpoints") == Finding("checkpoints", Status.OK, "small (0 MiB)")

    write_safetensors(folder / "short.safetensors", missing_bytes=1)
    (folder / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    (folder / "empty.safetensors").touch()
    found = finding("checkpoints")
    assert found.status is Status.MISSING
    assert found.detail.count("small/") == 3
