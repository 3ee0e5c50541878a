"""The guards of conftest.py guard."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

CONFTEST = Path(__file__).with_name("conftest.py")

SUITE = """
import pytest, random, torch
def test_plain(): assert torch.get_num_threads() == 2
@pytest.mark.slow
def test_slow(): random.seed(5)
@pytest.mark.gpu
def test_gpu(): torch.zeros(1, device="cuda")
"""


@pytest.mark.parametrize("_again", [1, 2])
def test_randomness_starts_the_same_in_every_test(_again: int) -> None:
    assert random.random() == pytest.approx(0.8444218515250481)
    assert np.random.random() == pytest.approx(0.5488135039273248)
    assert torch.rand(()).item() == pytest.approx(0.4962566, abs=1e-6)


def test_other_machines_cannot_be_reached() -> None:
    with pytest.raises(OSError, match="tests run without network"):
        socket.create_connection(("198.51.100.1", 80), timeout=1)
    with pytest.raises(URLError, match="tests run without network"):
        urllib.request.urlopen("http://example.invalid", timeout=1)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sock, pytest.raises(OSError, match="tests run without network"):
        sock.sendto(b"x", ("198.51.100.1", 9))


def test_this_machine_can_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("localhost", port), timeout=5).close()
        assert server.accept()[1][0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("options", "require_cuda", "summary"),
    [
        ([], "0", "1 passed, 1 skipped, 1 deselected"),
        (["--slow"], "0", "2 passed, 1 skipped"),
        (["-m", "slow"], "0", "1 passed, 2 deselected"),
        ([], "1", "1 failed, 1 passed, 1 deselected"),
    ],
)
def test_slow_and_gpu_marks(
    tmp_path: Path, options: list[str], require_cuda: str, summary: str
) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  slow: x\n  gpu: x\n")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options],
        cwd=tmp_path,
        env={"PATH": "", "CUDA_VISIBLE_DEVICES": "", "FOVEATE_REQUIRE_CUDA": require_cuda},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert summary in run.stdout, run.stdout + run.stderr
