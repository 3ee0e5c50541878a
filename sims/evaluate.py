"""Success of a policy in closed loop, against how many visual tokens it keeps, and by which method.

    python -m sims.evaluate --model DIR --methods vla_pruner,fastv --keep 1,0.25 --out results.jsonl

Waiting mode: the world stands still while the policy thinks. A cell is a method with a kept share;
all cells play the same episodes, and each task before the next begins, since building a task's
environments takes longer than playing them. Outcomes are appended to a file, a JSON line for each
episode, as soon as a cell is done with a task; a run that is started again plays what is missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from policies.models import quiet
from policies.vla import load
from policies.vla.openvla import OpenVLAPolicy
from stream.config import parse
from stream.data import Budget, Observation
from stream.errors import ConfigError
from stream.memory import Memory
from stream.reducers.base import Reducer
from stream.reducers.identity import Identity
from stream.reducers.vla_pruner import begin_episode
from stream.registry import reducer_class

from .pool import Batch, Pool, evaluate

STATIC = (
    "reach",
    "push",
    "pick-place",
    "drawer-open",
    "door-open",
    "button-press-topdown",
    "window-open",
    "plate-slide",
    "faucet-open",
    "faucet-close",
)
SIGHT_CRITICAL = ("push", "pick-place", "plate-slide", "faucet-open", "faucet-close")

Pictures = Literal["own", "blank", "other"]
"""What the policy is shown: its own episode, grey, or the episode of the next slot."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the table. method: a reducer's name and settings, `full`, or a control's name."""

    method: str
    keep: float
    reducer: Reducer
    pictures: Pictures = "own"

    @property
    def site(self) -> str:
        return str(self.reducer.site)

    @classmethod
    def of(cls, method: str, keep: float) -> Cell:
        """method: such as fastv, vla_pruner:mode=paper or vla_pruner:layer=2."""
        name, *settings = method.split(":")
        reducer = parse("", reducer_class(name), settings, origin=method)
        shown = [s for s in settings if not s.startswith("layer=")]
        return cls(":".join([name, *shown]), keep, reducer)


def cells_of(methods: Sequence[str], keeps: Sequence[float], controls: bool) -> list[Cell]:
    """Every method at every share below 1, one cell with all tokens, and the two controls."""
    cells = [Cell("full", 1.0, Identity())] if 1.0 in keeps else []
    if controls:
        shown = (p for p in get_args(Pictures) if p != "own")
        cells += [Cell(f"{p} pictures", 1.0, Identity(), p) for p in shown]
    return cells + [Cell.of(m, k) for k in keeps if k < 1 for m in methods]


@dataclass(slots=True)
class Player:
    """Acts for the slots of a pool, in batches, each slot with a memory of its own.

    tokens: visual tokens kept, over all `inferences`; a method may keep all while it warms up.
    """

    policy: OpenVLAPolicy
    cell: Cell
    lock: Lock
    memories: dict[int, Memory] = field(default_factory=dict)
    epochs: dict[int, int] = field(default_factory=dict)
    pictures: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    tokens: int = 0
    inferences: int = 0

    def __call__(self, batch: Batch) -> NDArray[np.float32]:
        for slot, fresh in zip(batch.slots, batch.fresh, strict=True):
            if fresh:
                self.epochs[slot] = self.epochs.get(slot, -1) + 1
                memory = self.memories.setdefault(slot, Memory(seed=slot))
                memory.reset()
                begin_episode(memory, self.epochs[slot])
        images = self._shown(batch)
        spec = self.policy.spec
        period_s = spec.execute * spec.dt_s
        seen = [
            Observation(dict(zip(spec.cameras, i, strict=True)), s, said, memory.tick * period_s)
            for i, s, said, memory in zip(
                images, batch.state, batch.instructions, self._memories(batch), strict=True
            )
        ]
        ready = [self.policy.reducer.is_ready(memory) for memory in self._memories(batch)]
        chunks = np.empty((len(seen), spec.execute, spec.action_size), np.float32)
        for alike in (True, False):
            part = [i for i, is_ready in enumerate(ready) if is_ready == alike]
            if part:
                with self.lock:
                    chunks[part] = self._act(
                        [batch.slots[i] for i in part], [seen[i] for i in part]
                    )
        return chunks

    def _act(self, slots: Sequence[int], seen: Sequence[Observation]) -> NDArray[np.float32]:
        policy, memories = self.policy, [self.memories[slot] for slot in slots]
        budget = Budget.ratio(self.cell.keep, of=policy.spec.grid.size)
        epochs = [self.epochs[slot] for slot in slots]
        prefixes = policy.prefill_batch(policy.encode_batch(seen), budget, memories, epochs)
        self.tokens += sum(prefix.tokens for prefix in prefixes)
        self.inferences += len(prefixes)
        chunks, attention = policy.act_batch(prefixes, seen)
        for prefix, one, memory in zip(prefixes, attention, memories, strict=True):
            policy.remember(prefix, one, memory)
        return np.stack([chunk.actions[: policy.spec.execute] for chunk in chunks])

    def _memories(self, batch: Batch) -> list[Memory]:
        return [self.memories[slot] for slot in batch.slots]

    def _shown(self, batch: Batch) -> NDArray[np.uint8]:
        if self.cell.pictures == "blank":
            return np.full_like(batch.images, 128)
        if self.cell.pictures == "own":
            return batch.images
        self.pictures |= dict(zip(batch.slots, batch.images, strict=True))
        slots = sorted(self.pictures)
        following = dict(zip(slots, slots[1:] + slots[:1], strict=True))
        return np.stack([self.pictures[following[slot]] for slot in batch.slots])


Jobs = list[tuple[str, int]]


def missing(
    cells: Sequence[Cell], jobs: Jobs, out: Path, model: str
) -> Iterator[tuple[Cell, Jobs]]:
    """The model's episodes that are not in the file yet: task by task, of each cell."""
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    own = [x for x in lines if x.get("model", model) == model]
    done = {(x["method"], x["keep"], x["site"], x["task"], x["seed"]) for x in own}
    tasks = dict.fromkeys(name for name, _ in jobs)
    for task, cell in product(tasks, cells):
        of_task = [job for job in jobs if job[0] == task]
        left = [job for job in of_task if (cell.method, cell.keep, cell.site, *job) not in done]
        if left:
            yield cell, left


def play(cell: Cell, jobs: Jobs, pool: Pool, policy: OpenVLAPolicy, lock: Lock) -> list[Any]:
    """The outcomes of some episodes of a cell as lines of the file; tokens: mean over them all."""
    player = Player(policy.pruned_by(cell.reducer), cell, lock)
    outcomes = evaluate(pool, jobs, player)
    return [
        {
            "model": policy.spec.name,
            "method": cell.method,
            "keep": cell.keep,
            "site": cell.site,
            "task": outcome.name,
            "seed": outcome.seed,
            "success": outcome.success,
            "score": outcome.score,
            "steps": outcome.steps,
            "tokens": player.tokens / player.inferences,
            "mode": "waiting",
        }
        for outcome in outcomes
    ]


def summary(out: Path) -> Table:
    """Success in percent by cell, pooled and on the sight-critical tasks."""
    table = Table(title=str(out))
    for column in ("method", "site", "keep", "success", "n", "sight-critical", "n"):
        table.add_column(column, justify="left" if column in ("method", "site") else "right")
    rows: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for line in map(json.loads, out.read_text().splitlines()):
        rows.setdefault((line["method"], line["site"], line["keep"]), []).append(line)
    critical = {f"metaworld:{task}" for task in SIGHT_CRITICAL}
    for (method, site, keep), lines in rows.items():
        cells = [method, site, f"{keep:g}"]
        for part in (lines, [x for x in lines if x["task"] in critical]):
            rate = np.mean([x["success"] for x in part]) if part else np.nan
            cells += [f"{100 * rate:.1f}", str(len(part))]
        table.add_row(*cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-vla", help="a name in the box, or a folder")
    parser.add_argument("--tasks", default=",".join(f"metaworld:{task}" for task in STATIC))
    parser.add_argument("--episodes", type=int, default=40, help="for each task")
    parser.add_argument("--first-seed", type=int, default=0, help="below the demonstrations' seeds")
    parser.add_argument("--methods", default="", help="such as fastv,vla_pruner:mode=paper")
    parser.add_argument("--keep", default="1", help="shares of the visual tokens")
    parser.add_argument("--controls", action="store_true", help="also blank and foreign pictures")
    parser.add_argument("--device")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--slots", type=int, default=50, help="episodes of a task played at once")
    parser.add_argument("--at-once", type=int, default=1, help="tasks that share the processes")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    names = args.tasks.split(",")
    jobs = [(n, args.first_seed + i) for n in names for i in range(args.episodes)]
    methods = [m for m in args.methods.split(",") if m]
    cells = cells_of(methods, [float(k) for k in args.keep.split(",")], args.controls)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    quiet()
    # Not captured: with every episode that ends a batch has another size.
    policy, lock = load(args.model, device=args.device, capture="off"), Lock()
    if not isinstance(policy, OpenVLAPolicy):
        raise ConfigError(f"'{args.model}' cannot play in batches; `foveate drive` plays it alone.")
    todo = list(missing(cells, jobs, args.out, policy.spec.name))
    processes, slots = args.processes // args.at_once, min(args.slots, args.episodes)
    with ExitStack() as stack:
        pools: SimpleQueue[Pool] = SimpleQueue()
        for _ in range(args.at_once):
            pools.put(stack.enter_context(Pool(slots, max(1, min(processes, slots)), names[0])))
        progress = stack.enter_context(Progress(console=Console(stderr=True)))
        bar = progress.add_task("tasks", total=len(todo))
        file = stack.enter_context(args.out.open("a"))
        workers = ThreadPoolExecutor(args.at_once)
        stack.callback(workers.shutdown, cancel_futures=True)
        writing = Lock()

        def one(cell: Cell, left: Jobs) -> None:
            pool = pools.get()
            try:
                lines = play(cell, left, pool, policy, lock)
            finally:
                pools.put(pool)
            with writing:
                file.writelines(json.dumps(line) + "\n" for line in lines)
                file.flush()

        for done in as_completed([workers.submit(one, cell, left) for cell, left in todo]):
            done.result()
            progress.advance(bar)
    Console().print(summary(args.out))


if __name__ == "__main__":
    main()
