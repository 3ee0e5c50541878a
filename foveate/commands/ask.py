"""`foveate ask`: a video, a question, an answer, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.panel import Panel

from ..settings import AskConfig, reducer_of
from ..show import out, print_json, progress_bars, table

if TYPE_CHECKING:
    from stream.pipeline import RunResult
    from stream.reducers.base import Reducer

STAGES = ("decode", "encode", "reduce", "prefill", "decode_tokens")


def ask(
    video: str, questions: Sequence[str], config: AskConfig, overlay: Path | None, as_json: bool
) -> None:
    """Answer, print, draw."""
    result = run(video, questions, config)
    if overlay:
        draw_overlay(overlay, result, config)
    if as_json:
        print_json(record(video, questions, config, result, overlay))
        return
    for question, answer in zip(questions, result.reply.answers, strict=True):
        out.print(Panel(f"[bold]{answer.text or '(no answer)'}[/]", title=question, expand=False))
    out.print(cost_table(result, config))
    if result.report.said:
        out.print(f"[yellow]source:[/] {result.report.said}")
    if result.restarts:
        out.print(f"[yellow]restarted and resumed:[/] {', '.join(result.restarts)}")
    if overlay:
        out.print(f"picture: {overlay}")


def run(video: str, questions: Sequence[str], config: AskConfig) -> RunResult:
    """One run through the pipeline, over Ray or in this process, with progress bars."""
    from stream.sources import Fps, Sampling, Uniform, open_source

    sampling: Sampling = Fps(config.fps, config.frames) if config.fps else Uniform(config.frames)
    reducer = reducer_of(config.reducer, **config.settings)
    if not Path(video).is_fifo():
        open_source(video, config.decoder).close()
    totals: dict[str, int | None] = {
        "decode": config.frames,
        "encode": config.frames,
        "reduce": config.frames,
        "answer": len(questions),
    }
    with progress_bars(totals) as progress:
        if config.runner == "ray":
            from stream.actors import run_ray

            model = partial(load_reasoner, config, reducer)
            return run_ray(
                video,
                config.decoder,
                sampling,
                model,
                reducer,
                model,
                questions,
                retain=config.retain,
                seed=config.seed,
                progress=progress,
            )
        from stream.pipeline import run_inline

        reasoner = load_reasoner(config, reducer)
        with open_source(video, config.decoder) as source:
            return run_inline(
                source,
                sampling,
                reasoner,
                reducer,
                reasoner,
                questions,
                retain=config.retain,
                seed=config.seed,
                progress=progress,
            )


def load_reasoner(config: AskConfig, reducer: Reducer) -> Any:
    """The model of a config; runs inside an actor when Ray does."""
    from policies.models import quiet
    from policies.reasoner import VideoReasoner

    quiet()
    return VideoReasoner.load(
        config.model,
        reducer,
        config.device,
        positions=config.positions,
        encoder=config.encoder,
        capture=config.capture,
        max_new_tokens=config.max_new_tokens,
    )


def cost_table(result: RunResult, config: AskConfig) -> Any:
    step = result.step
    layers = result.reply.layer_tokens
    share = step.tokens_out / step.tokens_in
    rows: list[tuple[str, str]] = [
        ("frames", f"{len(result.frames)} from {result.report.frames_decoded} decoded"),
        ("visual tokens", f"{step.tokens_in}"),
        ("reach the model", f"{step.tokens_out} ({share:.1%})"),
        ("mean over layers", f"{sum(layers) / max(1, len(layers)):.0f}"),
        ("segments", f"{len(result.video.segments)}"),
    ]
    rows += [(f"{stage} ms", f"{step.timings_ms.get(stage, 0.0):.0f}") for stage in STAGES]
    title = f"{config.model}, {config.reducer}, retain {config.retain:g}, {config.runner}"
    return table(title, ("what", "cost"), rows)


def draw_overlay(path: Path, result: RunResult, config: AskConfig) -> None:
    """The plan of the first question, inside the model included, over the frames."""
    from stream.sinks import overlay

    grid = result.video.grid
    step = max(1, len(result.frames) // grid.frames)
    overlay.write(
        path,
        result.frames[::step][: grid.frames],
        grid,
        result.reply.plans[0],
        result.video.segments,
        title=f"{config.reducer}, retain {config.retain:g}: {result.step.output['answers'][0]}",
    )


def record(
    video: str,
    questions: Sequence[str],
    config: AskConfig,
    result: RunResult,
    overlay: Path | None,
) -> dict[str, Any]:
    """Everything the tables say and more, as plain data."""
    step = result.step
    return {
        "video": video,
        "config": config.model_dump(),
        "answers": [
            {"question": q, "answer": a.text, "confidence": a.confidence}
            for q, a in zip(questions, result.reply.answers, strict=True)
        ],
        "frames": len(result.frames),
        "frame_times_s": [f.pts_s for f in result.frames],
        "tokens_in": step.tokens_in,
        "tokens_out": step.tokens_out,
        "tokens_by_layer": list(result.reply.layer_tokens),
        "segments": [[s.start, s.stop] for s in result.video.segments],
        "timings_ms": step.timings_ms,
        "source": result.report.as_dict(),
        "restarts": list(result.restarts),
        "overlay": str(overlay) if overlay else None,
    }
