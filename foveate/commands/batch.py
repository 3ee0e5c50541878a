"""`foveate batch`: a manifest of questions about videos, each video seen once, nothing lost."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer
from pydantic import Field
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from stream.batch.manifest import Layout

from .. import __version__
from ..settings import AskConfig, reducer_of
from ..show import err, out, print_json, table
from .ask import load_reasoner

if TYPE_CHECKING:
    from stream.batch.jobs import Outcome, VideoJob
    from stream.batch.worker import LoadedModel, VideoWorker

LOG_EVERY_S = 30.0
MODEL_SUFFIXES = {".safetensors", ".json", ".jinja", ".txt", ".model"}
"""Files that make a model what it is; its card does not."""

ENCODING = {
    "reducer",
    "settings",
    "retain",
    "frames",
    "fps",
    "decoder",
    "positions",
    "encoder",
    "seed",
}
"""Settings that decide the reduced tokens."""

ANSWERING = {"device", "capture", "max_new_tokens", "questions_at_once"}
"""Settings that decide the answers beside those; the others may change when a run goes on."""


class BatchConfig(AskConfig):
    """Many videos, many questions; see AskConfig for what is done with each.

    cpus_per_worker: Ray's reservation and torch's threads, without Ray too. questions_at_once: how
    many of a video's questions go through the model together. cache_gb: most that the cached tokens
    may take, the longest unused go first. layout: of the manifest.
    """

    workers: Annotated[int, Field(ge=1)] = 1
    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    questions_at_once: Annotated[int, Field(ge=1)] = 8
    cache_gb: Annotated[float, Field(ge=0)] = 20.0
    layout: Layout = Layout()


def batch(
    manifest_path: Path,
    folder: Path,
    config: BatchConfig,
    videos: Path | None,
    cache_folder: Path | None,
    address: str | None,
    retry_errors: bool,
    as_json: bool,
) -> None:
    """Do what is left to do, write results, print the summary."""
    if Path(config.model).is_dir():
        config = config.model_copy(update={"model": str(Path(config.model).absolute())})
    cache = (cache_folder or default_cache()).absolute()
    try:
        summary = _answer(manifest_path, folder, config, videos, cache, address, retry_errors)
    except KeyboardInterrupt:
        err.print(
            f"stopped; what is finished is in {folder}. Give the same command to go on.",
            soft_wrap=True,
        )
        raise typer.Exit(130) from None
    if as_json:
        print_json(summary)
        return
    title = f"{config.model}, {config.reducer}, retain {config.retain:g}, {config.runner}"
    out.print(table(title, ("what", "value"), _cells(summary)))
    _tell_of_errors(folder, summary)


def _answer(
    manifest_path: Path,
    folder: Path,
    config: BatchConfig,
    videos: Path | None,
    cache: Path,
    address: str | None,
    retry_errors: bool,
) -> dict[str, Any]:
    """The summary of the whole run, with the pace of this start."""
    from stream.batch.folder import carry_out, claim, locked
    from stream.batch.jobs import group
    from stream.batch.manifest import read_manifest
    from stream.batch.output import write_outputs

    manifest = read_manifest(manifest_path, config.layout, videos)
    jobs = group(manifest.rows)
    encoding = encoding_of(config)
    run = partial(_run, config, partial(make_worker, config, _hash(encoding), cache), address)
    with locked(folder):
        claim(folder, encoding | config.model_dump(include=ANSWERING))
        with (
            _Meter({job.key: len(rows) for job, rows in jobs.items()}) as meter,
            redirect_stdout(sys.stderr),  # Ray prints news of dead workers to stdout
        ):
            start_s = time.monotonic()
            outcomes = carry_out(
                folder,
                list(jobs),
                partial(run, meter.say),
                retry_errors=retry_errors,
                on_begin=meter.begin,
                on_outcome=meter.count,
            )
            wall_s = time.monotonic() - start_s
        shown = {"model": config.model, "reducer": config.reducer, "retain": config.retain}
        summary = write_outputs(folder, manifest, jobs, outcomes, shown)
    return summary | {
        "wall_s": wall_s,
        "rows_done_now": meter.rows_done,
        "rows_per_s": meter.rows_done / wall_s,
        "out": str(folder),
    }


def _run(
    config: BatchConfig,
    make: Callable[[], VideoWorker],
    address: str | None,
    say: Callable[[str], None],
    jobs: Sequence[VideoJob],
) -> Iterator[Outcome]:
    if config.runner == "inline":
        worker = make()
        yield from map(worker.run, jobs)
        return
    from stream.batch.pool import Place, run_pool

    place = Place(config.workers, config.cpus_per_worker, config.gpus_per_worker, address)
    yield from run_pool(jobs, make, place, say=say)


def make_worker(config: BatchConfig, cache_config: str, cache_folder: Path) -> VideoWorker:
    """A worker with its model; runs inside an actor when Ray does."""
    import torch

    from stream.batch.cache import TokenCache
    from stream.batch.worker import Recipe, VideoWorker
    from stream.sources import Fps, Uniform

    torch.set_num_threads(config.cpus_per_worker)
    reducer = reducer_of(config.reducer, **config.settings)
    recipe = Recipe(
        sampling=Fps(config.fps, config.frames) if config.fps else Uniform(config.frames),
        reducer=reducer,
        retain=config.retain,
        cache_config=cache_config,
        decoder=config.decoder,
        seed=config.seed,
        questions_at_once=config.questions_at_once,
    )
    cache = TokenCache(cache_folder, round(config.cache_gb * 1e9))
    return VideoWorker(partial(_load, config), recipe, cache)


def _load(config: BatchConfig) -> LoadedModel:
    from stream.batch.worker import LoadedModel

    model = load_reasoner(config, reducer_of(config.reducer, **config.settings))
    return LoadedModel(model, model, model.adapter.model.device)


def encoding_of(config: BatchConfig) -> dict[str, Any]:
    """All that decides the reduced tokens of a video, the model's weights included."""
    reducer = reducer_of(config.reducer, **config.settings)
    return config.model_dump(include=ENCODING) | {
        "model": fingerprint(config.model),
        "settings": reducer.model_dump(mode="json"),
        "version": __version__,
    }


def fingerprint(model: str) -> str:
    """A model's name with a hash of its files, or with its commit when a hub holds it."""
    from policies.models import in_the_box, quiet
    from stream.batch.cache import content_hash

    where = in_the_box().get(model, Path(model))
    if where.is_dir():
        files = sorted(p for p in where.iterdir() if p.suffix in MODEL_SUFFIXES)
        return f"{where.name}@{_hash({p.name: content_hash(p) for p in files})[:16]}"
    from transformers import AutoConfig

    from stream.errors import AttachError

    quiet()
    try:
        return f"{model}@{AutoConfig.from_pretrained(model)._commit_hash}"
    except (OSError, ValueError) as error:
        raise AttachError(
            f"Model '{model}' cannot be had: {str(error).splitlines()[0]} "
            f"Give one of {', '.join(in_the_box())}, a folder, or a hub name."
        ) from error


def default_cache() -> Path:
    """The user's own folder for things that can be made again."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "foveate" / "tokens"


def _hash(data: Mapping[str, Any]) -> str:
    return sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


class _Meter:
    """Rows done, rate and time left: a bar in a terminal, a line now and then in a log.

    The rate counts from the first outcome, so that loading the model does not spoil it.
    """

    def __init__(self, rows: Mapping[str, int]) -> None:
        self._rows = rows
        self._total = sum(rows.values())
        self._before = 0
        self._errors = 0
        self._said_s = time.monotonic()
        self._first: tuple[float, int] | None = None
        self.rows_done = 0
        self._bar = Progress(
            TextColumn("rows"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            console=err,
            transient=True,
        )
        self._task = self._bar.add_task("rows", total=self._total, state="")

    def __enter__(self) -> Self:
        if err.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        err.print(text, style="yellow", highlight=False, soft_wrap=True)

    def begin(self, done: Mapping[str, Outcome]) -> None:
        """Note what earlier starts of the run finished."""
        self._before = sum(self._rows[key] for key in done)
        if done:
            self.say(f"going on: {self._before} of {self._total} rows are finished")
        self._bar.update(self._task, completed=self._before)

    def count(self, outcome: Outcome) -> None:
        now_s = time.monotonic()
        self.rows_done += self._rows[outcome.key]
        self._errors += self._rows[outcome.key] if outcome.error else 0
        done = self._before + self.rows_done
        first_s, first_rows = self._first = self._first or (now_s, self.rows_done)
        state = f"{self._errors} errors"
        if now_s > first_s:
            rate = (self.rows_done - first_rows) / (now_s - first_s)
            left_s = round((self._total - done) / rate)
            left = f"{left_s // 3600}:{left_s // 60 % 60:02d}:{left_s % 60:02d}"
            state = f"{rate:.2f} rows/s, {left} left, {state}"
        self._bar.update(self._task, completed=done, state=state)
        if not err.is_terminal and now_s - self._said_s >= LOG_EVERY_S:
            self._said_s = now_s
            self.say(f"{done} of {self._total} rows, {state}")


def _cells(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    share = summary["tokens_out"] / max(1, summary["tokens_in"])
    faults = summary["errors"]
    cells = [
        ("rows", f"{summary['rows']}"),
        ("answered", f"{summary['answered']}"),
        ("bad rows", f"{faults['row']}"),
        ("rows of failed videos", f"{faults['video'] + faults['worker']}"),
        ("videos", f"{summary['videos']}, {summary['videos_failed']} failed"),
        ("read in part", f"{summary['videos_read_in_part']}"),
        ("visual tokens", f"{summary['tokens_in']}"),
        ("reach the model", f"{summary['tokens_out']} ({share:.1%})"),
        ("mean over layers", f"{summary['layer_tokens_mean']:.0f} a video"),
        (
            "cache hits",
            f"{summary['cache_hits']} of {summary['videos'] - summary['videos_failed']}",
        ),
    ]
    cells += [(f"{stage} s", f"{spent:.1f}") for stage, spent in summary["cost_s"].items()]
    rate = f"{summary['rows_per_s']:.2f} ({summary['rows_done_now']} rows)"
    return [*cells, ("this start s", f"{summary['wall_s']:.1f}"), ("rows/s", rate)]


def _tell_of_errors(folder: Path, summary: Mapping[str, Any]) -> None:
    err.print(f"written: {folder}/results.jsonl", soft_wrap=True)
    if summary["cache_refused"]:
        err.print(f"tokens of {summary['cache_refused']} videos could not be cached: disk full?")
    if summary["answered"] < summary["rows"]:
        err.print(
            f"[bold red]{summary['rows'] - summary['answered']} rows have no answer[/]; why is in "
            f"{folder}/errors.jsonl; --retry-errors tries failed videos again",
            soft_wrap=True,
        )
