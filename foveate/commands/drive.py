"""`foveate drive`: a policy acts in a simulator inside a budget; say what it cost and gave up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..neighbour import Neighbour
from ..robot import budget_of, controller_of, drive_config, load_policy, timing_of
from ..settings import DriveSettings
from ..show import err, out, print_json, table

if TYPE_CHECKING:
    from sims.episode import Episode
    from sims.tally import Tally
    from stream.sinks.base import TickSink
    from stream.ticks import Tick

ADAPTATION = 10
"""Inferences that a controller has to adapt in after a neighbour came or went."""


def drive(
    environment: str,
    settings: DriveSettings,
    disturb: int | None,
    record: Path | None,
    rerun: Path | None,
    video: Path | None,
    dataset: Path | None,
    as_json: bool,
) -> None:
    """Run the episodes, record them, sum up."""
    import sims
    from sims.episode import Episode, check_fit

    policy = load_policy(settings)
    with ExitStack() as stack:
        world = stack.enter_context(sims.make(environment))
        check_fit(policy.spec, world.spec)
        sinks = [stack.enter_context(s) for s in sinks_of(record, rerun, video, dataset)]
        neighbour = stack.enter_context(Neighbour())
        world.reset(settings.seed)
        timing = timing_of(settings, policy, world.observe())
        budget_ms = budget_of(settings, timing.card, policy)
        about = {
            "environment": environment,
            "policy": policy.spec.name,
            "cameras": {c: world.spec.cameras[c] for c in policy.spec.cameras},
            "grid": list(astuple(policy.spec.grid)),
            "state_size": world.spec.state_size,
            "action_size": world.spec.action_size,
            "dt_s": world.spec.dt_s,
            "budget_ms": budget_ms,
            "time_source": timing.clock.label,
            "card": timing.note,
            "settings": settings.model_dump(mode="json"),
        }
        err.print(f"times: {timing.clock.label} ({timing.note})", highlight=False)
        lasts_ms = policy.spec.execute * world.spec.dt_s * 1e3
        if budget_ms is not None and budget_ms > lasts_ms and settings.mode == "realtime":
            err.print(
                f"A chunk lasts {lasts_ms:.0f} ms: a budget of {budget_ms:g} ms lets the robot "
                "stand while it thinks. In a moving world fewer tokens often solve more."
            )
        episode = Episode(
            world,
            policy,
            controller_of(settings, timing.card, policy),
            timing.clock,
            drive_config(settings, budget_ms),
            film=any(sink.needs_film for sink in sinks),
        )
        run = Run(episode, sinks, neighbour, disturb)
        seeds = range(settings.seed, settings.seed + settings.episodes)
        stopped = False
        try:
            with progress_line() as say:
                for seed in seeds:
                    run.play(seed, about, say)
        except KeyboardInterrupt:
            stopped = True
    result = {**about, **run.to_record()}
    if as_json:
        print_json(result)
    else:
        show(result, run.tally)
    if stopped:
        raise KeyboardInterrupt


class Run:
    """Episodes that were played: a tally of all, and a summary of each that came to its end.

    settled: the ticks of a disturbed run that a controller had had time to adapt before.
    uncaptured: inferences that ran without a captured graph in part or whole, where the policy
    captures.
    """

    def __init__(
        self,
        episode: Episode[Any],
        sinks: Sequence[TickSink],
        neighbour: Neighbour,
        disturb: int | None,
    ) -> None:
        from sims.tally import Tally

        self._episode, self._sinks = episode, sinks
        self._neighbour, self._disturb = neighbour, disturb
        self.tally, self.settled = Tally(), Tally()
        self.uncaptured, self._runs = 0, self._uncaptured_runs()
        self.summaries: list[dict[str, Any]] = []

    def play(self, seed: int, about: Mapping[str, Any], say: Callable[[str], None]) -> None:
        """One episode, told to all sinks. about: of the run. say: shows a line of progress."""
        from sims.tally import Tally

        mine = Tally()
        for sink in self._sinks:
            sink.begin({**about, "seed": seed})
        for tick in self._episode.run(seed):
            mine.add(tick)
            self._count(tick)
            for sink in self._sinks:
                sink.write(tick)
            say(line_of(tick, self.tally, seed))
        summary = {
            "seed": seed,
            "instruction": self._episode.instruction,
            "success": tick.success,
            "score": tick.score,
            "stopped": self._episode.stopped,
            **mine.to_record(),
        }
        self.summaries.append(summary)
        for sink in self._sinks:
            sink.end(summary)

    def _count(self, tick: Tick) -> None:
        """Count a tick, and let the neighbour come or go before the next."""
        every = self._disturb
        if every and self.tally.ticks % every >= ADAPTATION:
            self.settled.add(tick)
        self.tally.add(tick)
        before, self._runs = self._runs, self._uncaptured_runs()
        self.uncaptured += tick.chunk is not None and self._runs > before
        if every:
            self._neighbour.switch(self.tally.ticks // every % 2 == 1)

    def _uncaptured_runs(self) -> int:
        captured = self._episode.policy.captured
        return 0 if captured is None else int(captured.pool.uncaptured)

    def to_record(self) -> dict[str, Any]:
        record: dict[str, Any] = {"episodes": self.summaries, "all": self.tally.to_record()}
        record["uncaptured_inferences"] = self.uncaptured
        if self._disturb:
            record["disturbed"] = {
                "switched_every": self._disturb,
                "inferences_after_adaptation": self.settled.inferences,
                "misses_after_adaptation": self.settled.missed,
                "miss_rate_after_adaptation": round(self.settled.miss_rate, 4),
            }
        return record


def sinks_of(
    record: Path | None, rerun: Path | None, video: Path | None, dataset: Path | None
) -> Iterator[TickSink]:
    """The sinks that were asked for, each made when it is taken."""
    if record:
        from stream.sinks.jsonl import JsonLines

        yield JsonLines(record)
    if rerun:
        from stream.sinks.rerun_log import RerunLog

        yield RerunLog(rerun)
    if video:
        from stream.sinks.film import Film

        yield Film(video)
    if dataset:
        from stream.sinks.lerobot_ticks import LeRobotTicks

        yield LeRobotTicks(dataset)


@contextmanager
def progress_line() -> Iterator[Any]:
    """One line on standard error that a caller rewrites; drawn by the caller's thread alone."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("")

        def say(text: str) -> None:
            bar.update(task, description=text)
            bar.refresh()

        yield say


def line_of(tick: Tick, tally: Tally, seed: int) -> str:
    """One line about the latest inference, for a terminal."""
    predicted = "-" if tick.predicted_ms is None else f"{tick.predicted_ms:.0f}"
    return (
        f"seed {seed}  step {tick.first_step}  {tick.decision.tokens} tokens  "
        f"{predicted} predicted, {tick.elapsed_ms:.0f} ms  "
        f"{tick.decision.rung.name.lower()}  misses {tally.missed}/{tally.inferences}"
    )


def show(result: dict[str, Any], tally: Tally) -> None:
    """The tables a person reads."""
    budget = result["budget_ms"]
    rows = [
        (
            e["seed"],
            e["instruction"],
            "yes" if e["success"] else "no",
            f"{e['score']:.2f}",
            e["steps"],
            e["held_steps"],
            f"{e['misses']}/{e['inferences']}",
            e["announced_late"],
            f"{e['mean_tokens']:.0f}",
            e["stopped"],
        )
        for e in result["episodes"]
    ]
    what = "seed told success score steps held misses foreseen-late tokens stopped"
    columns = [name.replace("-", " ") for name in what.split()]
    title = f"{result['environment']}, {result['policy']}, " + (
        "no budget" if budget is None else f"budget {budget:g} ms"
    )
    out.print(table(title, columns, rows))
    out.print(table("Tokens", ("bucket", "inferences"), sorted(tally.tokens.items())))
    times = [
        (stage, *(f"{ms:.1f}" for ms in found.values()))
        for stage, found in tally.quantiles_ms().items()
    ]
    out.print(table(f"Time: {result['time_source']}", ("ms", "p50", "p95", "p99"), times))
    named = (
        ("Decided", tally.rungs),
        ("At the deadline", tally.got),
        ("Given up", tally.gave_up),
        ("Went wrong", tally.said),
    )
    for title, counter in named:
        if counter:
            out.print(table(title, ("what", "ticks"), counter.most_common()))
    if uncaptured := result["uncaptured_inferences"]:
        out.print(
            f"{uncaptured} of {tally.inferences} inferences ran without captured graphs, in part "
            "or whole: a shape that is new then, as of a camera that fails, is not captured while "
            "the robot waits"
        )
    if "disturbed" in result:
        found = result["disturbed"]
        out.print(
            f"a neighbour came and went every {found['switched_every']} ticks: "
            f"{found['misses_after_adaptation']} misses in "
            f"{found['inferences_after_adaptation']} inferences, {ADAPTATION} after each change "
            f"left out ({found['miss_rate_after_adaptation']:.1%})"
        )
