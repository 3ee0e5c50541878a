"""A run's folder survives any kill; what it leaves behind is in order and complete."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from stream.batch.folder import carry_out, claim, locked
from stream.batch.jobs import Outcome, VideoJob, group
from stream.batch.journal import Journal
from stream.batch.manifest import BadRow, Manifest, Row
from stream.batch.output import choice_of, write_outputs
from stream.errors import ConfigError


def outcome(key: str = "k", **more: object) -> Outcome:
    return Outcome.from_record(
        Outcome(key, answers=(("röt\u2028", 0.5),), tokens_in=9, ms={"encode": 1.5}).to_record()
        | more
    )


def row(number: int, video: str, options: tuple[str, ...] = ()) -> Row:
    return Row(number, str(number), video, f"/v/{video}", "q?", options, "q?", "B")


def test_a_torn_line_is_left_out_wherever_it_is_cut(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.append(outcome("a"))
        journal.append(outcome("b"))
    shard = next(tmp_path.glob("*.jsonl"))
    whole = shard.read_bytes()
    second = whole.index(b"\n") + 1
    for cut in range(second, len(whole)):
        shard.write_bytes(whole[:cut])
        assert set(Journal(tmp_path).read()) == {"a"}
    shard.write_bytes(whole[: second + 5])
    with Journal(tmp_path) as journal:
        journal.append(outcome("b"))
        journal.append(outcome("a", error="late"))
    assert Journal(tmp_path).read() == {"a": outcome("a", error="late"), "b": outcome("b")}
    assert len(list(tmp_path.glob("*.jsonl"))) == 2


@pytest.mark.parametrize("damage", [b"\0\0\0\n", b"\xff\n", b"[]\n", b'{"key": 1}\n', b"3\n"])
def test_a_damaged_line_is_done_again(tmp_path: Path, damage: bytes) -> None:
    with Journal(tmp_path) as journal:
        journal.append(outcome("a"))
    shard = next(tmp_path.glob("*.jsonl"))
    shard.write_bytes(damage + shard.read_bytes())
    assert set(Journal(tmp_path).read()) == {"a"}


DRIVER = """
import sys, time
from pathlib import Path
from stream.batch.folder import carry_out, locked
from stream.batch.jobs import Outcome, VideoJob

def run(jobs):
    for job in jobs:
        time.sleep(0.01)
        print(job.path, flush=True)
        yield Outcome(job.key, answers=((job.path * 500, 0.5),))

jobs = [VideoJob(f"v{i}", ("q?",)) for i in range(40)]
with locked(Path(sys.argv[1])):
    print("begun", flush=True)
    carry_out(Path(sys.argv[1]), jobs, run)
"""


def test_a_driver_killed_again_and_again_does_no_finished_job_twice(tmp_path: Path) -> None:
    """kill -9 at random moments; at most the job at hand is done again after each."""
    moments = random.Random(0)
    started: list[str] = []
    kills = 0
    for attempt in range(12):
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert driver.stdout is not None
        assert driver.stdout.readline() == "begun\n"
        if attempt < 5:
            time.sleep(moments.uniform(0.0, 0.15))
            driver.send_signal(signal.SIGKILL)
        started += driver.stdout.read().split()
        kills += driver.wait() == -signal.SIGKILL
        if driver.returncode == 0:
            break
    assert driver.returncode == 0
    assert kills >= 2
    assert set(started) == {f"v{i}" for i in range(40)}
    assert len(started) <= 40 + kills
    assert len(Journal(tmp_path / "journal").read()) == 40


def jobs_and_runner(fail: set[str]) -> tuple[list[VideoJob], list[str], object]:
    seen: list[str] = []

    def run(jobs: Sequence[VideoJob]) -> Iterator[Outcome]:
        for job in jobs:
            seen.append(job.path)
            error = "broken" if job.path in fail else None
            yield outcome(job.key, error=error, fault="video" if error else None)

    return [VideoJob(name, ("q?",)) for name in "abc"], seen, run


def test_errors_are_tried_again_only_when_asked(tmp_path: Path) -> None:
    jobs, seen, run = jobs_and_runner({"b"})
    carry_out(tmp_path, jobs, run)  # type: ignore[arg-type]
    carry_out(tmp_path, jobs, run)  # type: ignore[arg-type]
    assert seen == ["a", "b", "c"]
    done = carry_out(tmp_path, jobs, run, retry_errors=True)  # type: ignore[arg-type]
    assert seen == ["a", "b", "c", "b"]
    assert [o.error for o in done.values()] == [None, "broken", None]


def test_more_questions_about_a_video_are_a_new_job(tmp_path: Path) -> None:
    jobs, seen, run = jobs_and_runner(set())
    carry_out(tmp_path, jobs, run)  # type: ignore[arg-type]
    grown = [VideoJob("a", ("q?", "and?")), *jobs[1:]]
    assert len(carry_out(tmp_path, grown, run)) == 3  # type: ignore[arg-type]
    assert seen == ["a", "b", "c", "a"]


def test_other_settings_and_a_second_writer_are_refused(tmp_path: Path) -> None:
    claim(tmp_path, {"retain": 0.1, "frames": (1, 2)})
    claim(tmp_path, {"retain": 0.1, "frames": (1, 2)})
    with pytest.raises(ConfigError, match=r"retain was 0\.1, now 0\.2"):
        claim(tmp_path, {"retain": 0.2, "frames": (1, 2)})
    with locked(tmp_path), pytest.raises(ConfigError, match="Another run"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_run_of_an_earlier_version_goes_on_and_is_held_to_what_is_new(tmp_path: Path) -> None:
    claim(tmp_path, {"retain": 0.1, "frames": 2})
    claim(tmp_path, {"retain": 0.1, "frames": 2, "capture": "auto"})
    with pytest.raises(ConfigError, match="capture was 'auto', now 'off'"):
        claim(tmp_path, {"retain": 0.1, "frames": 2, "capture": "off"})
    with pytest.raises(ConfigError, match="frames was 2, now None"):
        claim(tmp_path, {"retain": 0.1, "capture": "auto"})


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("B", "B"),
        ("b.", "B"),
        ("(B) a blue star", "B"),
        ("B: blue", "B"),
        ("A blue star.", "B"),
        ("A man walks", None),
        ("D", None),
        ("", None),
    ],
)
def test_choices(answer: str, choice: str | None) -> None:
    assert choice_of(answer, ("red", "a blue star", "none")) == choice


def test_outputs_are_in_the_manifests_order(tmp_path: Path) -> None:
    rows = (row(1, "a", ("x", "y")), row(2, "b"), row(4, "a"), row(5, "c"))
    manifest = Manifest(rows, (BadRow(3, "the line is empty"),), "videomme")
    jobs = group(rows)
    keys = {job.path[-1]: job.key for job in jobs}
    done = {
        keys["a"]: outcome(keys["a"], answers=[["B", 0.25], ["röt", 0.5]], tokens_out=3),
        keys["b"]: outcome(keys["b"], answers=[["no", 0.5]], cached="hit"),
        keys["c"]: outcome(keys["c"], answers=[], error="it is broken", fault="video"),
    }
    summary = write_outputs(tmp_path, manifest, jobs, done, {"model": "tiny", "retain": 0.1})
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").open()]
    errors = [json.loads(line) for line in (tmp_path / "errors.jsonl").open()]
    assert [(r["row"], r["answer"], r["choice"]) for r in results] == [
        (1, "B", "B"),
        (2, "no", None),
        (4, "röt", None),
    ]
    assert [(e["row"], e["fault"], e["reason"]) for e in errors] == [
        (3, "row", "the line is empty"),
        (5, "video", "it is broken"),
    ]
    assert summary["rows"] == 5
    assert summary["answered"] == 3
    assert summary["errors"] == {"row": 1, "video": 1, "worker": 0}
    assert (summary["encoded"], summary["cache_hits"]) == (1, 1)
    assert summary["cost_s"]["encode"] == pytest.approx(0.0045)
    assert not list(tmp_path.glob("*.tmp"))


def test_the_replay_log_answers_every_document_once(tmp_path: Path) -> None:
    """What lmms-eval's `from_log` looks up: logs[doc_id] = resps[0], then its first element."""
    rows = (row(1, "a"), row(3, "a"))
    manifest = Manifest(rows, (BadRow(2, "no video"),), "videomme")
    jobs = group(rows)
    key = next(iter(jobs)).key
    done = {key: outcome(key, answers=[["A", 0.5], ["C", 0.5]])}
    write_outputs(tmp_path, manifest, jobs, done, {"model": "tiny"})
    log = json.loads((tmp_path / "lmms_eval" / "videomme.json").read_text())
    assert log["args"] == {"model": "foveate", "model_args": "model=tiny", "limit": None}
    assert log["model_configs"]["task"] == "videomme"
    assert {e["doc_id"]: e["resps"][0][0] for e in log["logs"]} == {0: "A", 1: "", 2: "C"}
