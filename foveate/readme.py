"""The generated parts of README.md.

python -m foveate.readme                                        # write them anew
python -m foveate.readme --results RUN/results.json --title T   # with a run of `bench quality`
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .commands.methods import markdown_table, rows

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
QUALITY = ROOT / "policies" / "checkpoints" / "tiny_video" / "quality.json"


def rendered(text: str) -> str:
    """README text with every generated part made anew."""
    parts = {"methods": markdown_table(rows()), "quality": quality_markdown(QUALITY)}
    for name, body in parts.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = f"{before}{begin}\n{body}\n{end}{after}"
    return text


def quality_markdown(path: Path) -> str:
    """The tables of stored `bench quality` results, one a training seed."""
    if not path.exists():
        return "Not measured yet."
    return "\n\n".join(_one_run(run) for run in json.loads(path.read_text())["runs"])


def _one_run(run: dict[str, Any]) -> str:
    config, found = run["config"], run["rows"]
    head = (
        f"**{run['title']}**: {config['videos']} {config['split']} videos, "
        f"n = {found[0]['n']}, {config['frames']} frames, positions `{config['positions']}`, "
        f"seed {config['seed']}, {run['machine']}."
    )
    columns = ("method", "retain", "accuracy %", "of full %", "minus full (95 %)", "tokens", "mean")
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    for row in found:
        gap = f"{row['minus_full']:+.1f} [{row['low']:+.1f}, {row['high']:+.1f}]"
        cells = (
            row["method"],
            f"{row['retain']:g}",
            f"{row['accuracy']:.1f}",
            f"{row['relative']:.1f}",
            gap,
            f"{row['tokens']:.0f}",
            f"{row['layer_tokens']:.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return head + "\n\n" + "\n".join(lines)


def publish(results: Path, title: str) -> None:
    """Put a run into the published results; it replaces the run of the same title."""
    runs = json.loads(QUALITY.read_text())["runs"] if QUALITY.exists() else []
    new = {"title": title} | json.loads(results.read_text())
    kept = [run for run in runs if run["title"] != title]
    QUALITY.write_text(json.dumps({"runs": [*kept, new]}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--title", default="tiny-video")
    given = parser.parse_args()
    if given.results:
        publish(given.results, given.title)
    README.write_text(rendered(README.read_text()))


if __name__ == "__main__":
    main()
