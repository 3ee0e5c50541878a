"""What a run of the command line is configured by; see configs/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from policies.graphs.wanted import Capture
from stream.config import Config, load

if TYPE_CHECKING:
    from stream.reducers.base import Reducer

CONFIGS = Path(__file__).parent.parent / "configs"


class AskConfig(Config):
    """One video, some questions.

    model: a name in the box, a folder, or a hub name. settings: of the reducer. retain: share of
    the visual tokens to keep. frames: how many, evenly spaced; fps: instead, that many a second.
    encoder: `merge` or `skip` lets a SigLIP tower compute less, see policies/vision.
    capture: answers and SigLIP towers run as captured programs: `auto` on CUDA, `on`, `off`. What
    comes alike in a second request is captured then, and fast from there on. An answer takes about
    three steps longer once for each number of questions asked together and each length of prompt
    and answer, rounded up to 256, at every layer where tokens leave; its question once for each
    length, rounded up to 32. Encoding takes three passes once for each number of frames.
    """

    model: str = "tiny-video"
    reducer: str = "holitom"
    settings: dict[str, Any] = Field(default_factory=dict)
    retain: Annotated[float, Field(gt=0, le=1)] = 0.15
    frames: Annotated[int, Field(ge=1, le=1024)] = 32
    fps: Annotated[float, Field(gt=0)] | None = None
    decoder: Literal["pyav", "decord"] = "pyav"
    positions: Literal["keep", "renumber"] = "keep"
    encoder: Literal["exact", "merge", "skip"] = "exact"
    capture: Capture = "auto"
    runner: Literal["ray", "inline"] = "ray"
    device: str | None = None
    seed: int = 0
    max_new_tokens: Annotated[int, Field(ge=1)] = 16


class DriveSettings(Config):
    """A policy in a simulator, inside a budget.

    model: a name in the box, a folder, or a hub name. settings: of the reducer.
    mode: whether the world waits while the policy computes. time: wall, card:FILE or ms:60.
    budget_ms: from the observation to the actions; None takes 1.3 times the median of an inference
    with a quarter of the tokens. keep: a fixed share of the tokens instead of the controller's
    choice. floor_tokens: least tokens the controller may take without saying so. align: which
    actions of a chunk count as past, see sims/episode.py. stop_after: misses in a row before the
    episode is given up. capture: whether the policy runs in fixed shapes, as captured graphs; auto
    = on CUDA, where the policy can.
    """

    model: str = "tiny-vla"
    reducer: str = "vla_pruner_input"
    settings: dict[str, Any] = Field(default_factory=dict)
    mode: Literal["realtime", "waiting"] = "realtime"
    time: str = "wall"
    budget_ms: Annotated[float, Field(gt=0)] | None = None
    keep: Annotated[float, Field(gt=0, le=1)] | None = None
    floor_tokens: Annotated[int, Field(ge=0)] = 0
    align: Literal["moves", "time"] = "moves"
    stop_after: Annotated[int, Field(ge=1)] = 40
    episodes: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=0)] = 0
    device: str | None = None
    capture: Capture = "auto"


class ReducerConfig(Config):
    """A reducer with its settings, as a file of configs/reducers/."""

    reducer: str
    settings: dict[str, Any] = Field(default_factory=dict)


def variants() -> dict[str, Path]:
    """Named settings of reducers: the files of configs/reducers/."""
    return {p.stem: p for p in sorted((CONFIGS / "reducers").glob("*.yaml"))}


def reducer_of(name: str, overrides: Sequence[str] = (), **settings: Any) -> Reducer:
    """A reducer or a variant of configs/reducers/ by name.

    overrides: `name.setting=value`; those of other names are left out.
    """
    from stream.config import parse
    from stream.registry import build_reducer, reducer_names, suggest

    stem = name.replace("-", "_")
    mine = [f"settings.{o[len(stem) + 1 :]}" for o in overrides if o.startswith(f"{stem}.")]
    if stem in variants():
        chosen = load(variants()[stem], ReducerConfig, mine)
    elif stem in reducer_names():
        chosen = parse(f"reducer: {stem}", ReducerConfig, mine)
    else:
        raise suggest("reducer", name, {*reducer_names(), *variants()})
    return build_reducer(chosen.reducer, **chosen.settings | settings)
