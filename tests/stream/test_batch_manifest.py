"""Rows of a manifest: the same from every format, bad ones set aside with number and reason."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from foveate.commands.batch import BatchConfig
from stream.batch.jobs import group
from stream.batch.manifest import Layout, read_manifest
from stream.config import load
from stream.errors import ConfigError, SourceError

CONFIGS = Path(__file__).parent.parent.parent / "configs" / "batch"
ROWS: list[dict[str, Any]] = [
    {"id": "7", "video": "a.mp4", "question": 'says "hi",\nand?', "options": None},
    {"id": "8", "video": "/b/c.mp4", "question": "welche Straße?", "options": ["rot", "blau"]},
    {"id": "9", "video": "sub/../a.mp4", "question": "what?", "options": None},
    {"id": "8", "video": "a.mp4", "question": "again?", "options": None},
    {"id": "10", "video": "a.mp4", "question": " ", "options": None},
    {"id": "11", "video": "a.mp4", "question": "one?", "options": ["alone"]},
]
REASONS = {4: "also that of row 2", 5: "question is ' '", 6: "2 to 26"}


def jsonl(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
    return path


def written(folder: Path, ending: str) -> Path:
    path = folder / f"rows.{ending}"
    if ending == "jsonl":
        jsonl(path, *map(json.dumps, ROWS))
    elif ending == "json":
        path.write_text(json.dumps(ROWS))
    elif ending == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            for row in ROWS:
                options = json.dumps(row["options"]) if row["options"] else ""
                writer.writerow(row | {"options": options})
    return path


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_every_format_gives_the_same(tmp_path: Path, ending: str) -> None:
    manifest = read_manifest(written(tmp_path, ending))
    assert [(r.row, r.id, r.question) for r in manifest.rows] == [
        (1, "7", 'says "hi",\nand?'),
        (2, "8", "welche Straße?"),
        (3, "9", "what?"),
    ]
    here = str(tmp_path / "a.mp4")
    assert [r.path for r in manifest.rows] == [here, "/b/c.mp4", here]
    assert manifest.rows[1].prompt.startswith("welche Straße?\nA. rot\nB. blau\nAnswer with")
    assert [b.row for b in manifest.bad] == list(REASONS)
    assert all(REASONS[b.row] in b.reason for b in manifest.bad)
    assert [len(rows) for rows in group(manifest.rows).values()] == [2, 1]


def bad(path: Path) -> dict[int, str]:
    return {b.row: b.reason for b in read_manifest(path).bad}


def test_bad_lines_of_jsonl(tmp_path: Path) -> None:
    good = '{"video": "a", "question": "q"}'
    path = jsonl(
        tmp_path / "m.jsonl",
        b"\xef\xbb\xbf" + good.encode(),
        "{",
        b'{"video": "\xff", "question": "q"}',
        "[1]",
        "",
        '{"video": 3.5, "question": "q"}',
        '{"video": "a", "question": "\\ud800"}',
        '{"video": "a", "question": "q", "option": ["x", "y"]}',
        '{"video": "a", "question": "q", "options": {"A": "x"}}',
        "[" * 100_000,
        '{"video": "a", "question": "q", "id": true}',
        good,
        "",
        "",
    )
    reasons = bad(path)
    assert list(reasons) == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    for row, said in {
        2: "not JSON",
        3: "not UTF-8",
        4: "a list",
        5: "empty",
        6: "3.5",
        7: "not UTF-8",
        8: "is 'option' meant",
        9: "must be a list",
        11: "True",
    }.items():
        assert said in reasons[row]


def test_bad_lines_of_csv(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes(
        b'video,question,options\na,q,\na,q\n\na,\xff,\na,q,"A|B"\na,q,"[""x"", ""y""]"\na,"q" x,\n'
    )
    manifest = read_manifest(path)
    assert [r.row for r in manifest.rows] == [1, 6]
    assert manifest.rows[1].options == ("x", "y")
    said = [b.reason for b in manifest.bad]
    for reason, part in zip(
        said, ["2 cells", "empty", "UTF-8", "list in JSON", "CSV"], strict=True
    ):
        assert part in reason


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("m.txt", b"x", "must end in"),
        ("none.jsonl", None, "No such file"),
        ("m.json", b'{"video": "a"}', "a list of objects"),
        ("m.json", b"{", "not JSON"),
        ("m.csv", b"", "column names"),
        ("m.csv", b"video,video\n", "twice"),
        ("m.parquet", b"PAR1", "Parquet"),
    ],
)
def test_a_file_that_is_no_manifest(
    tmp_path: Path, name: str, content: bytes | None, says: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=says):
        read_manifest(tmp_path / name)


def layout_of(task: str) -> Layout:
    """A shipped mapping, as the command reads it."""
    return load(CONFIGS / f"{task}.yaml", BatchConfig).layout


def test_mvbench(tmp_path: Path) -> None:
    doc = {"video": "1.mp4", "question": "Which?", "candidates": ["up", "down"], "answer": "down"}
    path = tmp_path / "action_antonym.json"
    path.write_text(json.dumps([doc]))
    manifest = read_manifest(path, layout_of("mvbench"), tmp_path)
    row = manifest.rows[0]
    assert manifest.task == "mvbench_action_antonym"
    assert row.path == str(tmp_path / "ssv2_video_mp4" / "1.mp4")
    assert row.prompt == "Question:Which?\nOption:\n(A) up\n(B) down\nOnly give the best option.\n"
    assert row.target == "down"
    path.rename(tmp_path / "other.json")
    with pytest.raises(ConfigError, match="action_antonym"):
        read_manifest(tmp_path / "other.json", layout_of("mvbench"), tmp_path)


def test_videomme(tmp_path: Path) -> None:
    doc = {
        "question_id": "001-1",
        "videoID": "fFj",
        "duration": "short",
        "question": "When?",
        "options": ["A. now", "B. then", "C. soon", "D. never"],
        "answer": "B",
    }
    path = tmp_path / "test.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([doc]), path)
    (tmp_path / "fFj.mkv").touch()
    row = read_manifest(path, layout_of("videomme"), tmp_path).rows[0]
    assert (row.id, row.path, row.target) == ("001-1", str(tmp_path / "fFj.mkv"), "B")
    assert "correct option.\nWhen?\nA. now\nB. then\nC. soon\nD. never\n\nAnswer" in row.prompt


def test_egoschema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doc = {"question_idx": 4, "video_idx": "ab-1", "question": "Why?", "option": ["A. x", "B. y"]}
    path = tmp_path / "test.json"
    path.write_text(json.dumps([doc | {"answer": "1"}]))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    row = read_manifest(path, layout_of("egoschema")).rows[0]
    assert row.path == str(tmp_path / "hub" / "egoschema" / "videos" / "ab-1.mp4")
    assert row.prompt == (
        "Why?\nA. x\nB. y\nAnswer with the option's letter from the given choices directly."
    )
    assert row.id == "4"
