"""The command line as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from foveate.cli import app
from stream.errors import ConfigError, SourceError, UnknownNameError

runner = CliRunner()


def run_json(*arguments: str) -> Any:
    result = runner.invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def ask(clip: Path, checkpoint: Path, *more: str) -> Any:
    options = ["--model", str(checkpoint), "--runner", "inline", "--frames", "4"]
    return run_json("ask", str(clip), "where is the star?", *options, *more)


def test_ask_reports_answer_and_cost(clip: Path, checkpoint: Path, tmp_path: Path) -> None:
    picture = tmp_path / "out.png"
    record = ask(clip, checkpoint, "--retain", "0.25", "--overlay", str(picture))
    assert record["tokens_in"] == 4 * 196
    assert record["tokens_out"] == 196
    assert record["answers"][0]["question"] == "where is the star?"
    assert record["segments"][-1][1] == 4
    assert picture.stat().st_size > 1000


def test_ask_takes_variants_and_overrides(clip: Path, checkpoint: Path) -> None:
    outer = ask(clip, checkpoint, "--reducer", "holitom-outer")
    assert len(set(outer["tokens_by_layer"])) == 1
    whole = ask(clip, checkpoint, "--set", "settings.inner={drop: 0.75, layer: 2}")
    assert whole["tokens_by_layer"][2] < whole["tokens_by_layer"][1]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (["--reducer", "holitm"], UnknownNameError, "holitom"),
        (["--set", "retian=0.5"], ConfigError, "retain"),
        (["--set", "settings.tua=0.5"], ConfigError, "tau"),
        (["--retain", "1.5"], ConfigError, "1"),
    ],
)
def test_wrong_settings_say_what_is_allowed(
    clip: Path, checkpoint: Path, arguments: list[str], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        ask(clip, checkpoint, *arguments)


def test_missing_video(checkpoint: Path) -> None:
    with pytest.raises(SourceError, match=r"nowhere\.mp4"):
        ask(Path("nowhere.mp4"), checkpoint)


def test_methods_lists_every_reducer() -> None:
    from stream.registry import reducer_names

    assert {row["method"] for row in run_json("methods")} == set(reducer_names())


def test_bench_merge_meets_the_budget() -> None:
    sizes = ["--frames", "8", "--patches", "49", "--channels", "32", "--repeats", "2"]
    cost = run_json("bench", "merge", *sizes)
    assert cost["tokens_out"] == round(0.15 * 8 * 49)
    assert cost["median_ms"] > 0


def test_bench_decode(clip: Path) -> None:
    points = run_json("bench", "decode", str(clip))
    assert points[0]["rss_mib"] > 0


def test_check_inputs_exits_1_on_errors(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    result = runner.invoke(app, ["check", "inputs", str(clip), str(tmp_path), "--json"])
    rows = json.loads(result.stdout)
    assert result.exit_code == 1
    assert [r["result"] for r in rows] == ["ok", "error"]


def test_help_imports_nothing_heavy() -> None:
    probe = (
        "import sys; from typer.testing import CliRunner; from foveate.cli import app; "
        "CliRunner().invoke(app, ['ask', '--help']); "
        "print([m for m in ('torch', 'transformers', 'ray', 'av') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_errors_are_one_line_and_exit_code_2() -> None:
    command = [sys.executable, "-m", "foveate", "ask", "nowhere.mp4", "what?"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "nowhere.mp4" in done.stderr
    assert "Traceback" not in done.stderr
