"""The generated parts of README.md: `python -m foveate.readme` writes them."""

from __future__ import annotations

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


if __name__ == "__main__":
    README.write_text(rendered(README.read_text()))
