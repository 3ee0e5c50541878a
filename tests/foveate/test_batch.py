"""`foveate batch` with a real model on real clips: the same output whatever is killed."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from foveate.cli import app
from foveate.commands.batch import BatchConfig
from foveate.settings import CONFIGS
from policies.reasoner import VideoReasoner
from stream.batch import pool
from stream.batch.jobs import Outcome
from stream.batch.journal import Journal
from stream.config import load
from stream.errors import AttachError, ConfigError
from tests.conftest import write_clip

CLIPS = 6
QUESTIONS = ("what color is the star?", "where is the square?")
OPTIONS = ["red", "blue", "green"]
OUTPUTS = ("results.jsonl", "errors.jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, broken files and a manifest of them: questions interleaved, two rows bad."""
    folder = tmp_path_factory.mktemp("batch")
    for seed in range(CLIPS):
        write_clip(folder / f"v{seed}.mp4", 12, seed)
    (folder / "broken.mp4").write_bytes(b"no video " * 100)
    whole = (folder / "v0.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    names = [f"v{seed}.mp4" for seed in range(CLIPS)] + ["broken.mp4", "cut.mp4", "missing.mp4"]
    rows = [
        {"id": f"{name}-{i}", "video": name, "question": question, "options": options}
        for i, (question, options) in enumerate(zip(QUESTIONS, (None, OPTIONS), strict=True))
        for name in names
    ]
    rows[3]["question"] = ""
    rows[7]["id"] = rows[6]["id"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(r | {"options": json.dumps(r["options"] or [])} for r in rows)
    return folder


Arguments = Callable[..., list[str]]


@pytest.fixture(scope="module")
def arguments(folder: Path, checkpoint: Path) -> Arguments:
    """Of one run into `out` with a token cache beside it."""

    def arguments(out: Path, *more: str, manifest: str = "rows.jsonl") -> list[str]:
        common = ["--model", str(checkpoint), "--frames", "4", "--device", "cpu"]
        common += ["--set", "max_new_tokens=2", "--cache", str(out.parent / "cache")]
        return ["batch", str(folder / manifest), "--out", str(out), *common, *more]

    return arguments


def batch(arguments: Sequence[str]) -> Any:
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def outputs(out: Path) -> list[bytes]:
    return [(out / name).read_bytes() for name in OUTPUTS]


@pytest.fixture(scope="module")
def unbroken(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    batch(arguments(out, "--runner", "inline"))
    return out


def test_rows_errors_and_summary(unbroken: Path) -> None:
    results = [json.loads(line) for line in (unbroken / "results.jsonl").open()]
    errors = [json.loads(line) for line in (unbroken / "errors.jsonl").open()]
    summary = json.loads((unbroken / "summary.json").read_text())
    assert [r["row"] for r in results] == [1, 2, 3, 5, 6, 10, 11, 12, 13, 14, 15]
    assert {(r["tokens_in"], r["tokens_out"]) for r in results} == {(784, 118)}
    assert [(e["row"], e["fault"]) for e in errors] == [
        (4, "row"),
        (7, "video"),
        (8, "row"),
        (9, "video"),
        (16, "video"),
        (17, "video"),
        (18, "video"),
    ]
    assert "broken.mp4" in errors[1]["reason"]
    assert "does not exist" in errors[3]["reason"]
    assert summary["rows"] == len(results) + len(errors)
    assert summary["encoded"] == CLIPS
    assert all(summary["cost_s"][s] > 0 for s in ("hash", "decode", "encode", "reduce", "prefill"))


@pytest.mark.parametrize("manifest", ["rows.csv", "rows.parquet"])
def test_other_formats_give_the_same_and_encode_nothing_again(
    unbroken: Path, arguments: Arguments, manifest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VideoReasoner, "encode", None)
    out = unbroken.parent / manifest
    summary = batch(arguments(out, "--runner", "inline", manifest=manifest))
    assert outputs(out) == outputs(unbroken)
    assert (summary["encoded"], summary["cache_hits"]) == (0, CLIPS)


def test_each_video_is_encoded_once_and_other_questions_cost_no_encoding(
    folder: Path, arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = []
    encode = VideoReasoner.encode

    def counted(self: VideoReasoner, part: Any) -> Any:
        frames.append(len(part))
        return encode(self, part)

    monkeypatch.setattr(VideoReasoner, "encode", counted)
    inline = ("--runner", "inline")
    batch(arguments(tmp_path / "one", *inline))
    assert sum(frames) == 4 * CLIPS
    copy = folder / "copy.mp4"
    copy.write_bytes((folder / "v2.mp4").read_bytes())
    other = folder / "other.jsonl"
    other.write_text(json.dumps({"video": "copy.mp4", "question": "what is last?"}) + "\n")
    summary = batch(arguments(tmp_path / "two", *inline, manifest="other.jsonl"))
    assert (sum(frames), summary["cache_hits"]) == (4 * CLIPS, 1)
    summary = batch(
        arguments(tmp_path / "three", *inline, "--retain", "0.5", manifest="other.jsonl")
    )
    assert (sum(frames), summary["encoded"]) == (4 * CLIPS + 4, 1)


def start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "foveate", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(videos: int, out: Path, driver: subprocess.Popen[str]) -> None:
    """Until that many videos are in the journal."""
    while len(Journal(out / "journal").read()) < videos:
        assert driver.poll() is None, driver.communicate()[1]
        time.sleep(0.01)


def test_a_killed_driver_goes_on(unbroken: Path, arguments: Arguments, tmp_path: Path) -> None:
    """kill -9 after two videos, Ctrl-C after one more, then to the end."""
    out = tmp_path / "out"
    driver = start(arguments(out, "--runner", "inline"))
    wait_for(2, out, driver)
    driver.kill()
    driver.wait()
    first = len(Journal(out / "journal").read())
    assert 2 <= first < CLIPS + 3
    assert not (out / "results.jsonl").exists()

    driver = start(arguments(out, "--runner", "inline"))
    wait_for(first + 1, out, driver)
    driver.send_signal(signal.SIGINT)
    said = driver.communicate()[1]
    assert driver.returncode == 130, said
    assert "Give the same command to go on" in said
    assert "Traceback" not in said

    batch(arguments(out, "--runner", "inline"))
    assert outputs(out) == outputs(unbroken)
    assert len(list((out / "journal").iterdir())) == 3


def test_a_finished_run_loads_no_model(
    unbroken: Path, arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("policies.reasoner.VideoReasoner.load")
    before = outputs(unbroken)
    assert batch(arguments(unbroken, "--runner", "inline"))["rows_done_now"] == 0
    assert outputs(unbroken) == before


def test_wrong_use_says_what_to_do(
    unbroken: Path, arguments: Arguments, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"retain was 0\.15, now 0\.5"):
        batch(arguments(unbroken, "--retain", "0.5"))
    with pytest.raises(AttachError, match="no-such-model"):
        batch(arguments(tmp_path / "out", "--model", str(tmp_path / "no-such-model")))
    with pytest.raises(ConfigError, match="workers"):
        batch(arguments(tmp_path / "out", "--workers", "0"))


def test_a_dataset_of_lmms_eval_is_scored_by_its_rules(
    folder: Path, arguments: Arguments, tmp_path: Path
) -> None:
    docs = [
        {"videoID": name, "question_id": str(i), "question": "what?", "options": ["A. x", "B. y"]}
        for i, name in enumerate(("v0", "nowhere", "v1"))
    ]
    parquet.write_table(pyarrow.Table.from_pylist(docs), folder / "docs.parquet")
    task = ("--config", str(CONFIGS / "batch" / "videomme.yaml"), "--videos", str(folder))
    batch(arguments(tmp_path / "out", "--runner", "inline", *task, manifest="docs.parquet"))
    log = json.loads((tmp_path / "out" / "lmms_eval" / "videomme.json").read_text())
    results = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").open()]
    said = {entry["doc_id"]: entry["resps"][0][0] for entry in log["logs"]}
    assert said == {0: results[0]["answer"], 1: "", 2: results[1]["answer"]}


@pytest.mark.parametrize("path", sorted((CONFIGS / "batch").glob("*.yaml")), ids=lambda p: p.name)
def test_batch_configs_build(path: Path) -> None:
    config = load(path, BatchConfig)
    assert (config.layout.task is None) == (path.stem == "default")


def test_help_imports_nothing_heavy() -> None:
    probe = (
        "import sys; from typer.testing import CliRunner; from foveate.cli import app; "
        "CliRunner().invoke(app, ['batch', '--help']); "
        "print([m for m in ('torch', 'transformers', 'ray', 'av') if m in sys.modules])"
    )
    environment = os.environ | {"COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.usefixtures("one_ray")
def test_a_killed_worker_changes_nothing(
    unbroken: Path, arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 of the worker while it is at the third video."""
    workers: list[int] = []
    finished: list[str] = []
    append = Journal.append

    def append_and_kill(self: Journal, outcome: Outcome) -> None:
        append(self, outcome)
        finished.append(outcome.key)
        if len(finished) == 2:
            os.kill(workers[0], signal.SIGKILL)

    monkeypatch.setattr(Journal, "append", append_and_kill)
    monkeypatch.setattr(pool, "run_pool", partial(pool.run_pool, on_start=workers.append))
    batch(arguments(tmp_path / "out"))
    assert outputs(tmp_path / "out") == outputs(unbroken)
    assert len(workers) == 2
    assert len(finished) == len(set(finished)) == CLIPS + 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_driver_and_a_lost_node_of_a_cluster(
    unbroken: Path, arguments: Arguments, tmp_path: Path
) -> None:
    """Two nodes with a worker each: kill -9 of the driver, then of a node under the next one."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    try:
        lost = cluster.add_node(num_cpus=1)
        out = tmp_path / "out"
        over = arguments(out, "--address", cluster.address, "--workers", "2")
        driver = start(over)
        wait_for(2, out, driver)
        driver.kill()
        driver.wait()
        first = len(Journal(out / "journal").read())
        assert first < CLIPS + 3

        driver = start(over)
        wait_for(first + 1, out, driver)
        cluster.remove_node(lost, allow_graceful=False)
        said = driver.communicate()[1]
        assert driver.returncode == 0, said
        assert outputs(out) == outputs(unbroken)
    finally:
        cluster.shutdown()
