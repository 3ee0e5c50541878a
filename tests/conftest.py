"""Guards around every test: seeded randomness, no network, and no test that skips unseen; and what
tests of several packages share."""

from __future__ import annotations

import errno
import ipaddress
import os
import random
import signal
import socket
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

for _offline in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.setdefault(_offline, "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # our kernels, on the CPU; read at import

hypothesis.settings.register_profile(
    "foveate", deadline=None, derandomize=bool(os.environ.get("CI"))
)
hypothesis.settings.load_profile("foveate")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(2)
    # A shell's background job ignores Ctrl-C, and so would every process that a test starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out slow tests unless asked for; skip GPU tests where a GPU is neither had nor due."""
    if not config.getoption("--slow") and "slow" not in config.option.markexpr:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    if not torch.cuda.is_available() and os.environ.get("FOVEATE_REQUIRE_CUDA") != "1":
        no_gpu = pytest.mark.skip(reason="no CUDA device; FOVEATE_REQUIRE_CUDA=1 makes this fail")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """The same random numbers for every test, whatever ran before; the old state comes back."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


@cache
def _no_pictures() -> str:
    """Why MuJoCo cannot render here; empty if it can."""
    import sims
    from stream.errors import SimulatorError

    try:
        with sims.make("metaworld:reach") as env:
            env.reset(0)
            env.observe()
    except SimulatorError as error:
        return str(error)
    return ""


@pytest.fixture(scope="session")
def pictures() -> None:
    """For tests that look through a simulator's cameras; FOVEATE_REQUIRE_GL=1 forbids to skip."""
    if _no_pictures() and os.environ.get("FOVEATE_REQUIRE_GL") != "1":
        pytest.skip(_no_pictures())


def write_clip(path: Path, frames: int, seed: int) -> Path:
    """Frames of 64 x 48: a still picture with a moving bright square."""
    import av

    background = np.random.default_rng(seed).integers(0, 120, (48, 64, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for t in range(frames):
            image = background.copy()
            image[8:16, 2 * t : 2 * t + 8] = 250
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", 24, 0)


@pytest.fixture(scope="session")
def one_ray() -> Iterator[None]:
    """Ray on this machine, started once for all tests that use it."""
    from stream.actors import local_ray

    with local_ray():
        yield


def _own_names() -> set[str]:
    """This machine's name and the addresses it stands for; Ray's processes meet at one of them."""
    name = socket.gethostname()
    try:
        return {"localhost", name, *(str(found[4][0]) for found in socket.getaddrinfo(name, None))}
    except OSError:
        return {"localhost", name}


OWN_NAMES = _own_names()


def _is_here(host: str | bytes | None) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    if not name or name in OWN_NAMES:
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _refuse(host: Any) -> None:
    raise OSError(errno.ENETUNREACH, f"tests run without network; this one reached for {host!r}")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections to other machines fail as if the cable were out; this machine can be reached."""
    for method in ("connect", "connect_ex", "sendto"):
        real = getattr(socket.socket, method)

        def guarded(sock: socket.socket, *args: Any, real: Any = real) -> Any:
            if sock.family in (socket.AF_INET, socket.AF_INET6) and not _is_here(args[-1][0]):
                _refuse(args[-1][0])
            return real(sock, *args)

        monkeypatch.setattr(socket.socket, method, guarded)

    look_up = socket.getaddrinfo

    def guarded_look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_here(host):
            _refuse(host)
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", guarded_look_up)
