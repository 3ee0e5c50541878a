"""`foveate demo`: the shipped samples, with all tokens and with a few, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..settings import AskConfig
from ..show import err, out, print_json, table
from .ask import draw_overlay, run

SHARES = (("identity", 1.0), ("holitom", 0.15), ("random_keep", 0.15))


def samples() -> list[dict[str, Any]]:
    """The shipped samples: {video, questions: [{question, answer}]} with absolute paths."""
    from policies.models import in_the_box

    folder = in_the_box()["tiny-video"] / "samples"
    listed = json.loads((folder / "samples.json").read_text())
    return [s | {"video": str(folder / s["video"])} for s in listed]


def demo(folder: Path, runner: str, as_json: bool) -> None:
    """Ask everything, print answers against the truth, write one picture for each video."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    pictures = []
    for sample in samples():
        questions = [q["question"] for q in sample["questions"]]
        truth = [q["answer"] for q in sample["questions"]]
        name = Path(sample["video"]).stem
        answers = {}
        for method, retain in SHARES:
            err.print(f"{name}: {method} at {retain:.0%} of the tokens")
            config = AskConfig.model_validate(
                {"reducer": method, "retain": retain, "runner": runner}
            )
            result = run(sample["video"], questions, config)
            answers[method] = [a.text for a in result.reply.answers]
            right = sum(a == t for a, t in zip(answers[method], truth, strict=True))
            timings = result.step.timings_ms
            rows.append(
                {
                    "video": name,
                    "method": method,
                    "tokens": result.step.tokens_out,
                    "right": f"{right}/{len(truth)}",
                    "encode_ms": round(timings["encode"]),
                    "reduce_ms": round(timings["reduce"]),
                    "prefill_ms": round(timings["prefill"]),
                }
            )
            if method == "holitom":
                pictures.append(folder / f"{name}.png")
                draw_overlay(pictures[-1], result, config)
        if not as_json:
            lines = [
                (q, t, *(_marked(answers[m][i], t) for m, _ in SHARES))
                for i, (q, t) in enumerate(zip(questions, truth, strict=True))
            ]
            heads = [f"{m} {r:.0%}" for m, r in SHARES]
            out.print(table(name, ("question", "truth", *heads), lines))
    if as_json:
        print_json({"rows": rows, "pictures": [str(p) for p in pictures]})
        return
    out.print(table("Cost", list(rows[0]), [list(r.values()) for r in rows]))
    out.print("pictures of where the tokens went: " + ", ".join(str(p) for p in pictures))


def _marked(answer: str, truth: str) -> str:
    return f"[green]{answer}[/]" if answer == truth else f"[red]{answer or '-'}[/]"
