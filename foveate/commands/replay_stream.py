"""`foveate replay` of a stream's record: why a thing was missed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..show import out, print_json, table

if TYPE_CHECKING:
    from stream.live.missed import Story


def replay_stream(
    folder: Path, at_s: float | None, within_s: float, stream: str | None, as_json: bool
) -> None:
    """Without a moment: what the record holds. With one: what became of the frames around it."""
    from stream.live.missed import stories
    from stream.live.record import read
    from stream.registry import suggest

    header, rows = read(folder)
    told = stories(rows)
    if stream is not None and stream not in told:
        raise suggest("stream", stream, told)
    chosen = {stream: told[stream]} if stream is not None else told
    report = {name: _report(story, at_s, within_s) for name, story in chosen.items()}
    if as_json:
        print_json({"header": header, "streams": report})
        return
    for name, said in report.items():
        _show(name, said, at_s, within_s)


def _report(story: Story, at_s: float | None, within_s: float) -> dict[str, Any]:
    if at_s is None:
        frames = sorted(story.fates)
        return {
            "counts": dict(story.kinds),
            "frames_s": [frames[0], frames[-1]] if frames else None,
            "answers": story.answers,
        }
    return {
        "frames": [{"pts_s": f.pts_s, "said": f.said} for f in story.around(at_s, within_s)],
        "missed": [
            {"pts_s": t, "dropped": dropped, "gap": list(causes)}
            for t, dropped, causes in story.missed
            if at_s - within_s <= t <= at_s + within_s
        ],
        "answers": [
            {**answer, "saw_it": story.saw(answer, at_s)}
            for answer in story.answers
            if answer["pts_s"] >= at_s
        ],
    }


def _show(name: str, said: dict[str, Any], at_s: float | None, within_s: float) -> None:
    if at_s is None:
        out.print(
            table(
                f"{name}: what the record holds",
                ("what", "times"),
                [(kind, count) for kind, count in sorted(said["counts"].items())],
            )
        )
        span = said["frames_s"]
        if span:
            out.print(f"frames from {span[0]:.1f} to {span[1]:.1f} s; ask about one with --at")
        return
    rows = [(f"{f['pts_s']:.2f}", f["said"]) for f in said["frames"]]
    for gap in said["missed"]:
        causes = f"; gap: {', '.join(gap['gap'])}" if gap["gap"] else ""
        rows.append((f"{gap['pts_s']:.2f}", f"{gap['dropped']} frames dropped before it{causes}"))
    out.print(
        table(
            f"{name}: {at_s:g} s, give or take {within_s:g} s",
            ("time s", "what became"),
            sorted(rows, key=lambda r: float(r[0])),
        )
    )
    if not rows:
        out.print("no frame was looked at then: none came, or the rate did not ask for one")
    for answer in said["answers"][:20]:
        saw = "saw it" if answer["saw_it"] else "did not see it: it had left the window"
        out.print(
            f"{answer['pts_s']:.1f} s  {answer['question']} -> {answer['answer']}  ({saw})",
            highlight=False,
        )
