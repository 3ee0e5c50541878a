"""Every shipped config loads and builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from foveate.commands.watch import WatchConfig
from foveate.serve.service import ServeConfig
from foveate.settings import CONFIGS, AskConfig, DriveSettings, reducer_of, variants
from stream.config import load
from stream.live.engine import StreamEngine


@pytest.mark.parametrize("path", sorted((CONFIGS / "ask").glob("*.yaml")), ids=lambda p: p.name)
def test_ask_configs_build(path: Path) -> None:
    config = load(path, AskConfig)
    assert reducer_of(config.reducer, **config.settings).stages


@pytest.mark.parametrize("path", sorted((CONFIGS / "drive").glob("*.yaml")), ids=lambda p: p.name)
def test_drive_configs_are_the_defaults_spelled_out(path: Path) -> None:
    config = load(path, DriveSettings)
    assert reducer_of(config.reducer, **config.settings).stages
    assert config == DriveSettings()


@pytest.mark.parametrize(
    ("path", "kind"),
    [(p, WatchConfig) for p in sorted((CONFIGS / "watch").glob("*.yaml"))]
    + [(p, ServeConfig) for p in sorted((CONFIGS / "serve").glob("*.yaml"))],
)
def test_live_configs_load_and_fit_a_stream(path: Path, kind: Any) -> None:
    config = load(path, kind)
    engine = StreamEngine("x", config.stream, reducer_of(config.reducer, **config.settings))
    assert isinstance(engine, StreamEngine)


@pytest.mark.parametrize("name", variants())
def test_reducer_variants_build(name: str) -> None:
    assert reducer_of(name).stages


def test_every_config_belongs_to_a_tested_kind() -> None:
    kinds = {p.parent.name for p in CONFIGS.rglob("*.yaml")}
    assert kinds <= {"ask", "batch", "drive", "reducers", "serve", "watch"}
