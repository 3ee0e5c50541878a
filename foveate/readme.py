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
BASELINES = ("random_keep", "uniform", "uniform_frames")
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
    """Tables of stored `bench quality` results: accuracy by run, and HoliTom against baselines."""
    if not path.exists():
        return "Not measured yet."
    runs = json.loads(path.read_text())["runs"]
    return "\n\n".join([*map(_head, runs), _accuracy(runs), _duels(runs)])


def _head(run: dict[str, Any]) -> str:
    config = run["config"]
    return (
        f"**{run['title']}**: {config['videos']} {config['split']} videos, "
        f"n = {run['rows'][0]['n']}, {config['frames']} frames, positions "
        f"`{config['positions']}`, seed {config['seed']}, {config['dtype']}, {run['machine']}."
    )


def _accuracy(runs: list[dict[str, Any]]) -> str:
    found = [{(r["method"], r["retain"]): r for r in run["rows"]} for run in runs]
    columns = ["method", "retain", "tokens", "mean"]
    columns += [f"{run['title']}: % (of full)" for run in runs]
    lines = []
    for key, row in found[0].items():
        cells = [key[0], f"{key[1]:g}", f"{row['tokens']:.0f}", f"{row['layer_tokens']:.0f}"]
        for run in found:
            mine = run.get(key)
            cells.append(f"{mine['accuracy']:.1f} ({mine['relative']:.1f})" if mine else "-")
        lines.append(cells)
    return _table(columns, lines)


def _duels(runs: list[dict[str, Any]]) -> str:
    """HoliTom minus each baseline at equal tokens, with paired intervals."""
    found = [{(d["retain"], d["other"]): d for d in run["holitom_minus"]} for run in runs]
    lines = []
    for key in found[0]:
        if key[1] in BASELINES:
            gaps = [_gap(run[key]) if key in run else "-" for run in found]
            lines.append([f"{key[0]:g}", key[1], *gaps])
    return _table(["retain", "HoliTom minus", *(run["title"] for run in runs)], lines)


def _gap(duel: dict[str, Any]) -> str:
    return f"{duel['points']:+.1f} [{duel['low']:+.1f}, {duel['high']:+.1f}]"


def _table(columns: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] * 2 + ["---:"] * (len(columns) - 2)
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, rule, *lines))


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
