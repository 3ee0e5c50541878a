"""`foveate demo`: a shipped sample, with a few tokens and with all, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..settings import AskConfig
from ..show import err, out, print_json, table
from .ask import draw_overlay, run

SHARES = (("holitom", 0.15), ("random_keep", 0.15), ("identity", 1.0))
QUESTIONS = 6


def demo(folder: Path, runner: str, as_json: bool) -> None:
    """Ask a sample a few things and write a picture of where its tokens went.

    runner: how HoliTom answers. What the methods cost is taken in this process, one after the
    other and once it is warm.
    """
    from policies.models import in_the_box
    from policies.video.tiny import dataset

    items = dataset.load_samples(in_the_box()["tiny-video"])
    video, asked = next(iter(dataset.by_video(items).items()))
    asked = asked[:QUESTIONS]
    questions = [item.question.text for item in asked]
    truth = [item.question.answer for item in asked]
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / f"{video.stem}.png"
    answers: dict[str, list[str]] = {}
    costs: list[dict[str, Any]] = []
    err.print(f"{video.name}: warming up")
    run(str(video), questions, AskConfig(runner="inline"))
    for method, retain in SHARES:
        err.print(f"{video.name}: {method} with {retain:.0%} of the tokens")
        config = AskConfig(reducer=method, retain=retain, runner="inline")
        result = run(str(video), questions, config)
        said = result
        if method == "holitom":
            if runner == "ray":
                err.print("... and over Ray actors, as `foveate ask` does")
                said = run(str(video), questions, config.model_copy(update={"runner": "ray"}))
            draw_overlay(picture, said, config)
        answers[method] = [a.text for a in said.reply.answers]
        timings = result.step.timings_ms
        costs.append(
            {
                "method": method,
                "tokens": result.step.tokens_out,
                "right": sum(a == t for a, t in zip(answers[method], truth, strict=True)),
                "questions": len(truth),
                **{f"{stage} ms": round(timings[stage]) for stage in ("encode", "reduce")},
                f"prefill ms, {len(truth)} questions": round(timings["prefill"]),
            }
        )
    if as_json:
        print_json(
            {
                "video": str(video),
                "questions": questions,
                "truth": truth,
                "answers": answers,
                "costs": costs,
                "picture": str(picture),
            }
        )
        return
    lines = [
        (question, right, *(_marked(answers[method][i], right) for method, _ in SHARES))
        for i, (question, right) in enumerate(zip(questions, truth, strict=True))
    ]
    heads = [f"{method} {retain:.0%}" for method, retain in SHARES]
    out.print(table(str(video), ("question", "truth", *heads), lines))
    out.print(table("Cost", list(costs[0]), [list(c.values()) for c in costs]))
    out.print(
        "HoliTom merges inside the model too, by what each question looks at, so it prefills every "
        "question anew; with the others all questions share one prefill.",
        soft_wrap=True,
    )
    out.print(f"where the tokens went: {picture}")


def _marked(answer: str, truth: str) -> str:
    return f"[green]{answer}[/]" if answer == truth else f"[red]{answer or '-'}[/]"
