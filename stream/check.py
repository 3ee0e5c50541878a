"""Does a reducer keep the contract? Run this on a new method before anything else.

    from stream.check import check_reducer
    assert check_reducer(MyReducer, tau=0.7) == []

Every stage is run the way the pipeline runs it, on small made-up videos: moving, still, all equal
and all zero, of 1 to 729 tokens, in float32 and bfloat16, with budgets from nothing to more than
there is. It takes a few seconds, needs no model, and leaves global random states as they were.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.reduction import ForkingPickler
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .data import Budget, PatchGrid, VisualTokens
from .errors import BudgetError, ConfigError, SignalError
from .memory import Memory
from .plan import Plan
from .reducers.base import Reducer, reduce_stage
from .registry import build_reducer
from .signals import Signal, Signals

Look = Literal["moving", "still", "equal", "zero"]

GRIDS = (
    PatchGrid(1, 1, 1),
    PatchGrid(2, 1, 1),
    PatchGrid(1, 1, 2),
    PatchGrid(1, 8, 8),
    PatchGrid(4, 4, 4),
    PatchGrid(1, 27, 27),
    PatchGrid(9, 9, 9),
)
MIDDLE = PatchGrid(4, 4, 4)
CHANNELS = 16
FEATURES = frozenset({"input_embeddings"})
"""Signals that are [n, d]; all others are [n]."""


def _numpy_state() -> Any:
    _, keys, *rest = np.random.get_state()
    return np.asarray(keys).tobytes(), rest


RANDOM_STATES: tuple[tuple[str, Callable[[], Any]], ...] = (
    ("torch", lambda: torch.get_rng_state().numpy().tobytes()),
    ("numpy", _numpy_state),
    ("Python", random.getstate),
)


@dataclass(frozen=True, slots=True)
class Scene:
    """Made-up tokens and signals, the same every time.

    look: moving = all features and signals differ; still = frames differ by little; equal and
        zero = all features are the same, all signals are the same.
    partial: a third of the grid's tokens left earlier. salt: another video of the same kind.
    """

    grid: PatchGrid
    look: Look = "moving"
    dtype: torch.dtype = torch.float32
    partial: bool = False
    salt: int = 0

    def __str__(self) -> str:
        g = self.grid
        part = ", partial" if self.partial else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{g.frames}x{g.rows}x{g.cols} {self.look}{part}, {dtype}"

    def tokens(self) -> VisualTokens:
        draw = torch.Generator().manual_seed(7 + self.salt)
        x = torch.randn(self.grid.size, CHANNELS, generator=draw)
        if self.look == "still":
            frame = x[: self.grid.per_frame].repeat(self.grid.frames, 1)
            x = torch.where(torch.rand(len(x), 1, generator=draw) < 0.9, frame + 0.01 * x, x)
        elif self.look == "equal":
            x = x[:1].repeat(self.grid.size, 1)
        elif self.look == "zero":
            x = torch.zeros_like(x)
        index = torch.arange(self.grid.size)
        if self.partial:
            index = index[index % 3 != 1]
        times = tuple(t / 2 for t in range(self.grid.frames))
        return VisualTokens(x.to(self.dtype)[index], index, self.grid, times)

    def signals(self) -> dict[Signal, Tensor]:
        draw = torch.Generator().manual_seed(11 + self.salt)
        values = {signal: torch.rand(self.grid.size, generator=draw) for signal in Signal}
        if self.look in ("equal", "zero"):
            values = {s: torch.full_like(v, self.look == "equal") for s, v in values.items()}
        tokens = self.tokens()
        values = {s: v[tokens.index] / self.grid.size for s, v in values.items()}
        return {s: tokens.x.float() if s in FEATURES else v for s, v in values.items()}


@dataclass(slots=True)
class _Findings:
    """What is wrong with one stage: for each rule the first case that broke it, and how many."""

    stage: str
    first: dict[str, str] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)

    def add(self, rule: str, case: str, detail: str = "") -> None:
        text = f"{rule}{': ' * bool(detail)}{detail} [{case}"
        self.first.setdefault(rule, text)
        self.count[rule] = self.count.get(rule, 0) + 1

    def lines(self) -> list[str]:
        return [
            f"{self.stage}: {text}; {self.count[rule]} cases]"
            if self.count[rule] > 1
            else f"{self.stage}: {text}]"
            for rule, text in self.first.items()
        ]


def check_reducer(reducer: str | type[Reducer] | Reducer, /, **settings: Any) -> list[str]:
    """What a reducer does that its contract forbids; an empty list if it conforms.

    reducer: a registered name or a class, built with `settings`; or an instance.

    Every stage must
    - give exactly `keeps` rows, whose anchors are unique and ascending, and a finite plan in which
      every row takes something. (A setting `order="published"` lifts the order, a setting
      `counts="published"` the count: such modes exist to repeat a publication.)
    - accept 1 to 729 tokens of one frame or several, any budget, zero vectors, equal features,
      float32 and bfloat16, features that carry gradients; a stage before the model may refuse
      partial grids with ConfigError.
    - be a function of tokens, declared signals, budget and memory alone: no global random state,
      no state of its own, the same plan for the same seed; where only seeds differ, equal scores
      may not fall differently unless the method is random by design.
    - read every signal it declares and no other; a NaN in one is a SignalError that names it.
    - leave tokens, signals, and the memory's seed and tick as they were.
    - be frozen and survive pickling.
    """
    if isinstance(reducer, str):
        reducer = build_reducer(reducer, **settings)
    elif isinstance(reducer, type):
        reducer = reducer.build(**settings)
    elif settings:
        raise ConfigError(
            f"{type(reducer).__name__} is built already, so {sorted(settings)} cannot be set; "
            "give the class or the name instead."
        )
    with _random_states_kept():
        return [line for stage in reducer.stages for line in _check_stage(stage)]


def _check_stage(stage: Reducer) -> list[str]:
    found = _Findings(type(stage).__name__)
    before = copy.deepcopy(stage)
    read: set[Signal] = set()
    for scene in _scenes():
        for budget in _budgets(scene.tokens().n):
            _check_plan(stage, scene, budget, found, read)
    _check_signals(stage, found, read)
    _check_ties(stage, found)
    _check_streams(stage, found)
    _check_gradients(stage, found)
    _check_frozen(stage, before, found)
    return found.lines()


def _scenes() -> Iterator[Scene]:
    looks: tuple[Look, ...] = ("moving", "still", "equal", "zero")
    for grid in GRIDS:
        yield from (Scene(grid, look) for look in looks)
        yield from (Scene(grid, look, torch.bfloat16) for look in ("moving", "still"))
        if grid.size > 2:
            yield Scene(grid, partial=True)


def _budgets(n: int) -> list[int]:
    return sorted({0, 1, n // 4, n - 1, n, 2 * n + 3})


def _check_plan(
    stage: Reducer, scene: Scene, budget: int, found: _Findings, read: set[Signal]
) -> None:
    case = f"{scene}, budget {budget}"
    tokens, values = scene.tokens(), scene.signals()
    untouched, untouched_values = scene.tokens(), scene.signals()

    def noted(signal: Signal) -> Callable[[], Tensor]:
        def give() -> Tensor:
            read.add(signal)
            return values[signal]

        return give

    signals = Signals({signal: noted(signal) for signal in values})
    memory = Memory(seed=3, tick=5)
    states = [get() for _, get in RANDOM_STATES]
    count = -1
    try:
        count = stage.keeps(tokens.n, Budget(budget))
        plan = reduce_stage(stage, tokens, signals, Budget(budget), memory)
    except BudgetError as error:
        if count != 0 or stage.site.in_llm:
            found.add("refuses a budget that can be met", case, str(error))
        return
    except Exception as error:
        may_refuse = scene.partial and not stage.site.in_llm
        if not (may_refuse and isinstance(error, ConfigError)):
            found.add(f"raises {type(error).__name__}", case, str(error))
        return
    finally:
        for state, (name, get) in zip(states, RANDOM_STATES, strict=True):
            if state != get():
                found.add(f"draws from {name}'s global random state", case)
    if not 0 <= count <= tokens.n:
        found.add("`keeps` is out of range", case, f"{count} of {tokens.n}")
    if not (torch.equal(tokens.x, untouched.x) and torch.equal(tokens.index, untouched.index)):
        found.add("changes the tokens in place", case)
    if any(not torch.equal(values[s], value) for s, value in untouched_values.items()):
        found.add("changes a signal in place", case)
    if (memory.seed, memory.tick) != (3, 5):
        found.add("changes the memory's seed or tick", case)
    for rule, detail in _plan_faults(stage, plan, untouched.x, count):
        found.add(rule, case, detail)


def _plan_faults(stage: Reducer, plan: Plan, x: Tensor, count: int) -> Iterator[tuple[str, str]]:
    """(rule, detail) for everything that is wrong with a plan over x [n, d]."""
    if plan.n != x.shape[0]:
        yield "the plan is for another number of tokens", f"{plan.n}, not {x.shape[0]}"
        return
    if plan.k != count and getattr(stage, "counts", "exact") != "published":
        yield "the number of rows is not what `keeps` says", f"{plan.k}, not {count}"
    if plan.anchor.unique().numel() != plan.k:
        yield "anchors repeat", str(plan.anchor.tolist()[:20])
    elif getattr(stage, "order", "time") != "published" and bool((plan.anchor.diff() < 0).any()):
        yield "anchors do not ascend", str(plan.anchor.tolist()[:20])
    row, _, weight = plan.entries()
    if not bool(torch.isfinite(weight).all()):
        yield "weights are not finite", ""
    if torch.unique(row[weight != 0]).numel() != plan.k:
        yield "a row takes nothing", f"{plan.k - torch.unique(row[weight != 0]).numel()} rows"
    out = plan.apply(x)
    if out.shape != (plan.k, x.shape[1]) or out.dtype != x.dtype:
        yield "applying the plan gives another shape or dtype", f"{tuple(out.shape)} {out.dtype}"
    elif not bool(torch.isfinite(out).all()):
        yield "applying the plan gives NaN or infinite features", ""


def _check_signals(stage: Reducer, found: _Findings, read: set[Signal]) -> None:
    for signal in sorted(stage.needs - read):
        found.add("declares a signal that it never reads", "any", f"'{signal}'")
    scene = Scene(MIDDLE)
    for signal in sorted(stage.needs & read):
        values = scene.signals()
        values[signal][-1] = torch.nan
        case = f"{scene}, NaN in '{signal}'"
        try:
            _run(stage, scene, MIDDLE.size // 4, Memory(), values)
        except SignalError as error:
            if signal not in str(error):
                found.add("a SignalError does not name the signal", case, str(error))
        except Exception as error:
            found.add("a NaN signal is no SignalError", case, f"{type(error).__name__}: {error}")
        else:
            found.add("a NaN signal passes unseen", case)


def _run(
    stage: Reducer, scene: Scene, budget: int, memory: Memory, values: dict[Signal, Tensor]
) -> Plan:
    return reduce_stage(stage, scene.tokens(), Signals(values), Budget(budget), memory)


def _record(
    stage: Reducer, scene: Scene, budget: int, memory: Memory, found: _Findings
) -> dict[str, Any] | None:
    """The plan as plain lists, None where it raises."""
    try:
        return _run(stage, scene, budget, memory, scene.signals()).to_record()
    except Exception as error:
        case = f"{scene}, budget {budget}, tick {memory.tick}"
        found.add(f"raises {type(error).__name__}", case, str(error))
        return None


def _check_ties(stage: Reducer, found: _Findings) -> None:
    """The same call gives the same plan, and seeds decide nothing but what is random by design."""
    moving, tied = Scene(MIDDLE), (Scene(MIDDLE, "equal"), Scene(MIDDLE, "zero"))
    budgets = [MIDDLE.size // 4, MIDDLE.size // 2]
    calls = [(scene, budget) for scene in (moving, *tied) for budget in budgets]

    def plans(seed: int, global_seed: int) -> list[Any]:
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)
        random.seed(global_seed)
        return [_record(stage, scene, budget, Memory(seed), found) for scene, budget in calls]

    once, again, other_seed = plans(0, 1), plans(0, 2), plans(1, 1)
    for (scene, budget), a, b in zip(calls, once, again, strict=True):
        if a != b:
            found.add("the same call gives another plan", f"{scene}, budget {budget}")
    random_by_design = once[: len(budgets)] != other_seed[: len(budgets)]
    for (scene, budget), a, b in zip(calls, once, other_seed, strict=True):
        if a != b and not random_by_design:
            found.add("equal scores are told apart by noise", f"{scene}, budget {budget}")


def _check_streams(stage: Reducer, found: _Findings) -> None:
    """Two streams, tick by tick in turn, give what each gives alone; a reset stream is new."""
    streams = [[Scene(MIDDLE, salt=4 * s + tick) for tick in range(3)] for s in range(2)]
    budget = MIDDLE.size // 4

    def ticks(scenes: Iterable[Scene], memory: Memory) -> Iterator[Any]:
        for scene in scenes:
            yield _record(stage, scene, budget, memory, found)
            memory.tick += 1

    alone = [list(ticks(scenes, Memory())) for scenes in streams]
    in_turn = zip(*(ticks(scenes, Memory()) for scenes in streams), strict=True)
    if [list(plans) for plans in zip(*in_turn, strict=True)] != alone:
        found.add("two streams affect each other", str(streams[0][0]))
    used = Memory()
    list(ticks(streams[1], used))
    used.reset()
    if list(ticks(streams[0], used)) != alone[0]:
        found.add("a reset stream remembers", str(streams[0][0]))


def _check_gradients(stage: Reducer, found: _Findings) -> None:
    """A plain forward outside of `torch.no_grad` brings features and signals with gradients."""
    scene = Scene(MIDDLE)
    tokens = scene.tokens()
    tokens = replace(tokens, x=tokens.x.requires_grad_() * 1.0)
    values = {signal: value.requires_grad_() * 1.0 for signal, value in scene.signals().items()}
    try:
        with torch.enable_grad():
            reduce_stage(stage, tokens, Signals(values), Budget(tokens.n // 4), Memory())
    except Exception as error:
        found.add(f"raises {type(error).__name__}", f"{scene}, with gradients", str(error))


def _check_frozen(stage: Reducer, before: Reducer, found: _Findings) -> None:
    if stage != before:
        found.add("its own fields changed while it ran", "any", f"{before!r} became {stage!r}")
    trial = copy.deepcopy(stage)
    for name in (*type(stage).model_fields, "something_new"):
        try:
            setattr(trial, name, getattr(trial, name, None))
        except Exception:
            continue
        found.add("is not frozen", "any", f"'{name}' can be set")
    try:  # the pickler that carries values between processes, on bytes made here
        copied = ForkingPickler.loads(ForkingPickler.dumps(stage))
    except Exception as error:
        found.add("cannot be pickled", "any", str(error))
        return
    if copied != stage:
        found.add("comes back changed from pickling", "any", f"{copied!r}, not {stage!r}")


@contextmanager
def _random_states_kept() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
