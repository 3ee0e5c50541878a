"""The conformance checker passes good reducers and names what is wrong with bad ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pydantic import ConfigDict
from torch import Tensor

from stream.check import Scene, check_reducer
from stream.data import Budget, PatchGrid, VisualTokens
from stream.errors import ConfigError
from stream.memory import Memory
from stream.ops import picks
from stream.plan import Plan
from stream.reducers.base import Reducer, Site
from stream.reducers.saliency import Saliency
from stream.signals import Signal, Signals


class Good(Reducer):
    """Top-k of a salient signal, through a method that the bad ones below replace."""

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.SALIENCY})

    def plan(self, tokens: VisualTokens, signals: Signals, budget: Budget, memory: Memory) -> Plan:
        score = signals[Signal.SALIENCY]
        return Plan.keep(self.choose(tokens, score, budget.tokens, memory), tokens.n)

    def choose(self, tokens: VisualTokens, score: Tensor, k: int, memory: Memory) -> Tensor:
        return picks.top(score, k)


class OneTooFew(Good):
    def choose(self, tokens: VisualTokens, score: Tensor, k: int, memory: Memory) -> Tensor:
        return picks.top(score, max(k - 1, 1))


class Descending(Good):
    def choose(self, tokens: VisualTokens, score: Tensor, k: int, memory: Memory) -> Tensor:
        return picks.top(score, k).flip(0)


class Repeats(Good):
    def choose(self, tokens: VisualTokens, score: Tensor, k: int, memory: Memory) -> Tensor:
        return picks.top(score, 1).repeat(k)


class NoisyTies(Good):
    def choose(self, tokens: VisualTokens, score: Tensor, k: int, memory: Memory) -> Tensor:
        return picks.top(score + 1e-9 * torch.rand(score.shape, generator=memory.generator()), k)


class GlobalNoise(Good):
    def choose(self, tokens: VisualTokens, score: Tensor, k: int, memory: Memory) -> Tensor:
        return picks.top(score + 1e-9 * torch.rand(score.shape), k)


class NumpyNoise(Good):
    def choose(self, tokens: VisualTokens, score: Tensor, k: int, memory: Memory) -> Tensor:
        return picks.top(score + float(np.random.rand()), k)


class PythonNoise(Good):
    def choose(self, tokens: VisualTokens, score: Tensor, k: int, memory: Memory) -> Tensor:
        return picks.top(score + random.random(), k)


class Fresh(Good):
    """Draws from a generator of its own that nobody seeded."""

    def choose(self, tokens: VisualTokens, score: Tensor, k: int, memory: Memory) -> Tensor:
        draw = torch.Generator()
        draw.seed()
        return picks.top(torch.rand(score.shape, generator=draw), k)


class ScalesTokens(Good):
    def choose(self, tokens: VisualTokens, score: Tensor, k: int, memory: Memory) -> Tensor:
        tokens.x.mul_(2)
        return picks.top(score, k)


class ScalesSignal(Good):
    def choose(self, tokens: VisualTokens, score: Tensor, k: int, memory: Memory) -> Tensor:
        score.add_(1)
        return picks.top(score, k)


class Reseeds(Good):
    def choose(self, tokens: VisualTokens, score: Tensor, k: int, memory: Memory) -> Tensor:
        memory.seed += 1
        return picks.top(score, k)


class Hoards(Good):
    """Keeps scores for the next tick in the class instead of the memory."""

    seen: ClassVar[dict[int, Tensor]] = {}

    def choose(self, tokens: VisualTokens, score: Tensor, k: int, memory: Memory) -> Tensor:
        before = self.seen.get(tokens.n, torch.zeros_like(score))
        self.seen[tokens.n] = score
        return picks.top(score + before, k)


class Remembers(Good):
    """The same in the memory, as it should be."""

    def choose(self, tokens: VisualTokens, score: Tensor, k: int, memory: Memory) -> Tensor:
        before = memory.state.get("score")
        memory.state["score"] = score
        return picks.top(score if before is None else score + before, k)


class Undeclared(Good):
    needs: ClassVar[frozenset[Signal]] = frozenset()


class Overdeclared(Good):
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.SALIENCY, Signal.LAST_ROW})


class Swallows(Good):
    """Catches the error that says that a signal is broken."""

    def plan(self, tokens: VisualTokens, signals: Signals, budget: Budget, memory: Memory) -> Plan:
        try:
            return super().plan(tokens, signals, budget, memory)
        except Exception:
            return Plan.keep(torch.arange(budget.tokens), tokens.n)


class Rewords(Good):
    def plan(self, tokens: VisualTokens, signals: Signals, budget: Budget, memory: Memory) -> Plan:
        try:
            return super().plan(tokens, signals, budget, memory)
        except Exception as error:
            raise RuntimeError("something is off") from error


class Thawed(Good):
    model_config = ConfigDict(frozen=False)
    share: float = 0.5


class DividesByNorm(Good):
    """Weights that zero vectors turn into NaN."""

    def plan(self, tokens: VisualTokens, signals: Signals, budget: Budget, memory: Memory) -> Plan:
        kept = picks.top(signals[Signal.SALIENCY], budget.tokens)
        norm = tokens.x.detach().float().norm(dim=-1)[kept]
        return Plan.merge(kept, torch.arange(kept.numel()), kept, norm / norm, tokens.n)


class EmptyRow(Good):
    def plan(self, tokens: VisualTokens, signals: Signals, budget: Budget, memory: Memory) -> Plan:
        kept = picks.top(signals[Signal.SALIENCY], budget.tokens)
        row = torch.arange(kept.numel())[1:]
        return Plan.merge(kept, row, kept[1:], torch.ones(row.shape), tokens.n)


class OtherCount(Good):
    def plan(self, tokens: VisualTokens, signals: Signals, budget: Budget, memory: Memory) -> Plan:
        kept = picks.top(signals[Signal.SALIENCY], budget.tokens)
        return Plan.keep(kept, tokens.n + 1)


class OnlyFloat32(Good):
    def choose(self, tokens: VisualTokens, score: Tensor, k: int, memory: Memory) -> Tensor:
        return picks.top(tokens.x @ torch.ones(tokens.x.shape[1]), k)


class ToNumpy(Good):
    def choose(self, tokens: VisualTokens, score: Tensor, k: int, memory: Memory) -> Tensor:
        return picks.top(score + float(tokens.x.float().numpy().sum()), k)


class WholeGridsOnly(Good):
    def choose(self, tokens: VisualTokens, score: Tensor, k: int, memory: Memory) -> Tensor:
        if not tokens.is_full:
            raise ConfigError("whole grids, please")
        return picks.top(score, k)


class WholeGridsInside(WholeGridsOnly):
    @property
    def site(self) -> Site:
        return Site(3)


class NeverNothing(Good):
    """Inside the model 0 is legal, and this one gives a row all the same."""

    @property
    def site(self) -> Site:
        return Site(3)

    def choose(self, tokens: VisualTokens, score: Tensor, k: int, memory: Memory) -> Tensor:
        return picks.top(score, max(k, 1))


class Twice(Good):
    """Two stages; the second is wrong."""

    @property
    def stages(self) -> tuple[Reducer, ...]:
        return (self, OneTooFew())


@pytest.mark.parametrize("reducer", [Good, Good(), Remembers, WholeGridsOnly, "saliency", Saliency])
def test_good_reducers_pass(reducer: Any) -> None:
    assert check_reducer(reducer) == []


@pytest.mark.parametrize(
    ("reducer", "finding"),
    [
        (OneTooFew, "number of rows is not what `keeps` says"),
        (NeverNothing, "number of rows is not what `keeps` says: 1, not 0"),
        (Descending, "anchors do not ascend"),
        (Repeats, "anchors repeat"),
        (NoisyTies, "equal scores are told apart by noise"),
        (GlobalNoise, "draws from torch's global random state"),
        (GlobalNoise, "the same call gives another plan"),
        (NumpyNoise, "draws from numpy's global random state"),
        (PythonNoise, "draws from Python's global random state"),
        (Fresh, "the same call gives another plan"),
        (ScalesTokens, "changes the tokens in place"),
        (ScalesSignal, "changes a signal in place"),
        (Reseeds, "changes the memory's seed or tick"),
        (Hoards, "two streams affect each other"),
        (Hoards, "a reset stream remembers"),
        (
            Undeclared,
            "raises SignalError: The reducer reads 'saliency' but declares only no signals",
        ),
        (Overdeclared, "declares a signal that it never reads: 'last_row'"),
        (Swallows, "a NaN signal passes unseen"),
        (Rewords, "a NaN signal is no SignalError: RuntimeError: something is off"),
        (Thawed, "is not frozen: 'share' can be set"),
        (DividesByNorm, "weights are not finite"),
        (EmptyRow, "a row takes nothing"),
        (OtherCount, "the plan is for another number of tokens"),
        (OnlyFloat32, "raises RuntimeError"),
        (ToNumpy, "raises RuntimeError: Can't call numpy() on Tensor that requires grad"),
        (WholeGridsInside, "raises ConfigError: whole grids, please"),
        (Twice, "OneTooFew: the number of rows"),
    ],
)
def test_bad_reducers_are_named(reducer: type[Reducer], finding: str) -> None:
    Hoards.seen.clear()
    lines = check_reducer(reducer)
    assert any(finding in line for line in lines), lines


def test_a_finding_says_where_and_how_often() -> None:
    (line,) = check_reducer(Descending)
    assert line.startswith("Descending: anchors do not ascend: [")
    assert "float32, budget" in line
    assert line.endswith("cases]")


def test_a_class_inside_a_function_cannot_be_pickled() -> None:
    class Local(Good):
        pass

    lines = check_reducer(Local)
    assert len(lines) == 1
    assert "cannot be pickled" in lines[0]


def test_settings_reach_the_reducer() -> None:
    assert check_reducer("holitom", counts="published", order="published") == []
    with pytest.raises(ConfigError, match="HoliTom cannot be built: tau"):
        check_reducer("holitom", tau=3)
    with pytest.raises(ConfigError, match="Did you mean 'saliency'"):
        check_reducer("salience")
    with pytest.raises(ConfigError, match=r"Good is built already, so \['tau'\] cannot be set"):
        check_reducer(Good(), tau=1)


@pytest.mark.parametrize("reducer", [Good, GlobalNoise, NumpyNoise, PythonNoise])
def test_global_random_states_stay_as_they_were(reducer: type[Reducer]) -> None:
    def states() -> tuple[Any, ...]:
        return (
            random.getstate(),
            str(np.random.get_state(legacy=False)),
            torch.get_rng_state().tolist(),
        )

    before = states()
    check_reducer(reducer)
    assert states() == before


@pytest.mark.parametrize(
    ("look", "holds"),
    [
        ("moving", lambda x: torch.unique(x, dim=0).shape[0] == 36),
        (
            "still",
            lambda x: (
                float((x.view(4, 9, -1).diff(dim=0).abs().amax(-1) < 0.2).float().mean()) > 0.5
            ),
        ),
        ("equal", lambda x: torch.unique(x, dim=0).shape[0] == 1),
        ("zero", lambda x: not x.any()),
    ],
)
def test_scenes_are_what_they_are_called(look: Any, holds: Callable[[Tensor], bool]) -> None:
    scene = Scene(PatchGrid(4, 3, 3), look)
    assert holds(scene.tokens().x)
    assert torch.equal(scene.tokens().x, scene.tokens().x)
    part = Scene(PatchGrid(4, 3, 3), look, torch.bfloat16, partial=True)
    assert part.tokens().n == 24
    assert part.tokens().x.dtype == torch.bfloat16
    assert {v.shape[0] for v in part.signals().values()} == {24}
    assert part.signals()[Signal.SALIENCY].shape == (24,)
