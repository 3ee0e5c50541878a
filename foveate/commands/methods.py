"""`foveate methods`."""

from __future__ import annotations

from ..show import out, print_json, table

COLUMNS = ("method", "acts at", "reads", "does", "source")


def rows() -> list[tuple[str, ...]]:
    """One row for each reducer, from its class."""
    from stream.registry import build_reducer, reducer_names

    found: list[tuple[str, ...]] = []
    for name in reducer_names():
        reducer = build_reducer(name)
        stages = reducer.stages
        needs = sorted({str(s) for stage in stages for s in stage.needs})
        summary = (type(reducer).__doc__ or "").strip().split("\n\n")[0]
        found.append(
            (
                name,
                ", ".join(str(s.site) for s in stages),
                ", ".join(needs) or "-",
                " ".join(summary.split()),
                reducer.source or "baseline",
            )
        )
    return found


def methods(markdown: bool, as_json: bool) -> None:
    """Print the reducers as a table, as Markdown or as JSON."""
    found = rows()
    if as_json:
        print_json([dict(zip(COLUMNS, row, strict=True)) for row in found])
    elif markdown:
        out.print(markdown_table(found), soft_wrap=True, markup=False, highlight=False)
    else:
        out.print(table("Reducers", COLUMNS, found))


def markdown_table(found: list[tuple[str, ...]]) -> str:
    """The README's method table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in found])
