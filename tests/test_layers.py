"""The shape of the house, read from the source: who imports whom, file names, file sizes."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = ("stream", "policies", "sims", "foveate")
FILES = sorted(path for package in ORDER for path in (ROOT / package).rglob("*.py"))
PICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
LONGEST = 400


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import, relative and dynamic ones included.

    `from a.b import c` counts as both a.b and a.b.c, since c may be a module.
    """
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(name, package) if node.level else name
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield node.lineno, argument.value


def imports_upwards(path: Path) -> list[str]:
    rank = ORDER.index(path.relative_to(ROOT).parts[0])
    return [
        f"{path.relative_to(ROOT)}:{line}: {ORDER[rank]} imports {module}"
        for line, module in imported(path)
        if module.split(".")[0] in ORDER[rank + 1 :]
    ]


def unsafe_loads(path: Path) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for line, module in imported(path)
        if module.split(".")[0] in PICKLERS or module == "torch.load"
    ] + [
        f"{path.relative_to(ROOT)}:{node.lineno}: torch.load"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load"
    ]


def test_the_four_packages_are_there() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(ORDER)


def test_imports_point_one_way() -> None:
    assert not [line for path in FILES for line in imports_upwards(path)]


def test_no_module_is_named_like_a_standard_one() -> None:
    names = {path: path.parent.name if path.stem == "__init__" else path.stem for path in FILES}
    taken = sys.stdlib_module_names - {"__main__"}
    assert not [str(path) for path, name in names.items() if name in taken]


def test_no_file_is_long() -> None:
    lengths = {path: path.read_text().count("\n") for path in FILES}
    assert not [f"{path}: {n} lines" for path, n in lengths.items() if n > LONGEST]


def test_nothing_unpickles() -> None:
    """Checkpoints are safetensors: a pickle runs whatever code its author put into it."""
    assert not [line for path in FILES for line in unsafe_loads(path)]


@pytest.mark.parametrize(
    ("source", "upwards", "unsafe"),
    [
        ("import stream.data", 0, 0),
        ("from policies.video import tiny", 2, 0),
        ("def f():\n    import foveate", 1, 0),
        ("from . import hooks\nfrom .policies import x", 0, 0),
        ("import importlib\nimportlib.import_module('sims.clock')", 1, 0),
        ("import pickle as p", 0, 1),
        ("from torch import load", 0, 1),
        ("import torch\ntorch.load('x')", 0, 1),
    ],
)
def test_the_checks_see_what_they_look_for(
    source: str, upwards: int, unsafe: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "stream" / "thing.py"
    path.parent.mkdir()
    path.write_text(source)
    assert len(imports_upwards(path)) == upwards
    assert len(unsafe_loads(path)) == unsafe
