"""What a finished run leaves behind, all in the manifest's order and free of clock readings.

For a dataset of lmms-eval the answers are written as the log that its model `from_log` replays:
its tasks then score them with their own code, which reads no other form of stored answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from .jobs import Outcome, VideoJob
from .journal import write_whole
from .manifest import Manifest, Row

STAGES = ("hash", "decode", "encode", "reduce", "prefill", "decode_tokens")

Jobs = Mapping[VideoJob, tuple[Row, ...]]


def choice_of(answer: str, options: tuple[str, ...]) -> str | None:
    """The letter of the option that an answer names, None if it names none or no letter."""
    said = answer.strip()
    for letter, text in zip(ascii_uppercase, options, strict=False):
        if said.rstrip(".").casefold() == text.strip().rstrip(".").casefold():
            return letter
    found = re.match(r"\(?([A-Za-z])(?:\)|[.:]|$)", said)
    letters = ascii_uppercase[: len(options)]
    return found[1].upper() if found and found[1].upper() in letters else None


def write_outputs(
    folder: Path,
    manifest: Manifest,
    jobs: Jobs,
    outcomes: Mapping[str, Outcome],
    model: Mapping[str, Any],
) -> dict[str, Any]:
    """Write everything, results.jsonl last; returns the summary. model: what answered."""
    results: dict[int, dict[str, Any]] = {}
    errors: dict[int, dict[str, Any]] = {
        bad.row: {"row": bad.row, "id": None, "video": None, "fault": "row", "reason": bad.reason}
        for bad in manifest.bad
    }
    for job, rows in jobs.items():
        outcome = outcomes[job.key]
        for i, row in enumerate(rows):
            if outcome.error is None:
                results[row.row] = _result(row, outcome, *outcome.answers[i])
            else:
                errors[row.row] = {
                    "row": row.row,
                    "id": row.id,
                    "video": row.video,
                    "fault": outcome.fault,
                    "reason": outcome.error,
                }
    if manifest.task:
        logs = folder / "lmms_eval"
        logs.mkdir(exist_ok=True)
        log = replay_log(manifest, results, model)
        write_whole(logs / f"{manifest.task}.json", json.dumps(log, indent=1) + "\n")
    summary = summarise(manifest, jobs, outcomes)
    write_whole(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_whole(folder / "errors.jsonl", _lines(errors))
    write_whole(folder / "results.jsonl", _lines(results))
    return summary


def _lines(by_row: Mapping[int, Mapping[str, Any]]) -> str:
    return "".join(f"{json.dumps(by_row[n], ensure_ascii=False)}\n" for n in sorted(by_row))


def _result(row: Row, outcome: Outcome, answer: str, confidence: float) -> dict[str, Any]:
    return {
        "row": row.row,
        "id": row.id,
        "video": row.video,
        "question": row.question,
        "options": list(row.options),
        "answer": answer,
        "choice": choice_of(answer, row.options),
        "confidence": confidence,
        "tokens_in": outcome.tokens_in,
        "tokens_out": outcome.tokens_out,
        "note": outcome.note,
    }


def replay_log(
    manifest: Manifest, results: Mapping[int, Mapping[str, Any]], model: Mapping[str, Any]
) -> dict[str, Any]:
    """For `lmms_eval --model from_log --model_args logs=FOLDER`.

    Every row needs a response there; one without an answer has an empty one. Most scorers count
    that as wrong, MVBench's leaves it out: mind errors.jsonl beside its accuracy.
    """
    targets = {row.row: row.target for row in manifest.rows}
    logs = []
    for row in range(1, manifest.size + 1):
        answer = results[row]["answer"] if row in results else ""
        logs.append(
            {
                "doc_id": row - 1,
                "target": targets.get(row),
                "resps": [[answer]],
                "filtered_resps": [answer],
            }
        )
    arguments = ",".join(f"{key}={value}" for key, value in model.items())
    return {
        "args": {"model": "foveate", "model_args": arguments, "limit": None},
        "model_configs": {"task": manifest.task},
        "logs": logs,
    }


def summarise(manifest: Manifest, jobs: Jobs, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Counts and costs of all videos, whichever start of the run did them."""
    good = [outcomes[job.key] for job in jobs if outcomes[job.key].error is None]
    failed = [outcomes[job.key] for job in jobs if outcomes[job.key].error is not None]
    rows_of = {job.key: len(rows) for job, rows in jobs.items()}
    answered = sum(rows_of[o.key] for o in good)
    by_fault = {"row": len(manifest.bad), "video": 0, "worker": 0}
    for outcome in failed:
        by_fault[str(outcome.fault)] += rows_of[outcome.key]
    weighed = sum(o.layer_tokens * rows_of[o.key] for o in good)
    return {
        "rows": manifest.size,
        "answered": answered,
        "errors": by_fault,
        "videos": len(jobs),
        "videos_failed": len(failed),
        "videos_read_in_part": sum(bool(o.note) for o in good),
        "frames": sum(o.frames for o in good),
        "tokens_in": sum(o.tokens_in for o in good),
        "tokens_out": sum(o.tokens_out for o in good),
        "layer_tokens_mean": weighed / max(1, answered),
        "encoded": sum(o.cached != "hit" for o in good),
        "cache_hits": sum(o.cached == "hit" for o in good),
        "cache_refused": sum(o.cached == "failed" for o in good),
        "cost_s": {s: sum(o.ms.get(s, 0.0) for o in [*good, *failed]) / 1e3 for s in STAGES},
    }
