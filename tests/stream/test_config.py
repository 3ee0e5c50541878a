"""Strict YAML: what is read, what is refused, and what the refusal says."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from stream.config import Config, content_hash, dump, load, parse
from stream.errors import ConfigError
from stream.registry import reducer_class, reducer_names


class Site(enum.Enum):
    INPUT = "input"
    LAYER = "layer"


class Merge(Config):
    kind: Literal["merge"] = "merge"
    tau: float = Field(0.8, ge=0, le=1)


class Drop(Config):
    kind: Literal["drop"] = "drop"
    keep: int | None = None


class Window(Config):
    longest: int = Field(16, gt=0)
    site: Site = Site.INPUT


class Run(Config):
    name: str
    window: Window = Window()
    steps: tuple[Annotated[Merge | Drop, Field(discriminator="kind")], ...] = ()
    limits_ms: dict[str, float] = Field(default_factory=dict)
    out: Path | None = None

    @model_validator(mode="after")
    def _names_are_short(self) -> Run:
        if len(self.name) > 100:
            raise ValueError("name has more than 100 letters")
        return self


FULL = """
name: a run
window: {longest: 8, site: layer}
steps:
  - {kind: merge, tau: 1e-1}
  - {kind: drop, keep: 3}
limits_ms: {encode: 30, "on": 2.5}
out: runs/a
"""


def refusal(text: str, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text, Run, overrides, origin="run.yaml")
    return str(caught.value)


def test_load_reads_every_kind_of_value(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(FULL)
    assert load(path, Run) == Run(
        name="a run",
        window=Window(longest=8, site=Site.LAYER),
        steps=(Merge(tau=0.1), Drop(keep=3)),
        limits_ms={"encode": 30.0, "on": 2.5},
        out=Path("runs/a"),
    )


def test_an_empty_file_gives_the_defaults() -> None:
    assert parse("# nothing yet\n", Window) == Window()


def test_configs_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Window().longest = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("plain", "value"),
    [("on", "on"), ("No", "No"), ("2026-01-01", "2026-01-01"), ("1:30", "1:30"), ("'3'", "3")],
)
def test_plain_scalars_that_older_yaml_would_change_stay_text(plain: str, value: str) -> None:
    assert parse(f"name: {plain}", Run).name == value


def test_overrides_win_in_order() -> None:
    run = parse(
        FULL,
        Run,
        [
            "window.longest=9",
            "window.longest=10",
            "steps.1.keep=",
            "limits_ms={a: 1.5}",
            "name='7'",
        ],
    )
    assert run.window.longest == 10
    assert run.steps[1] == Drop(keep=None)
    assert run.limits_ms == {"a": 1.5}
    assert run.name == "7"
    assert parse("name: x", Run, ["window.longest=2"]).window == Window(longest=2)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("window.longest", "must look like key=value"),
        ("=3", "must look like key=value"),
        ("window..longest=3", "must look like key=value"),
        ("name.first=3", "name is 'a run', which has no keys"),
        ("steps.2.tau=1", "steps is a list of 2, so '2' must be a position from 0 to 1"),
        ("steps.first.tau=1", "'first' must be a position"),
        ("window.longest=&a 3", "override 'window.longest=&a 3', line 1, column 1: anchors"),
        ("window.longst=3", "Did you mean 'longest'?"),
        ("window.longest=0", "window.longest (override 'window.longest=0'): given 0 (int)"),
    ],
)
def test_bad_overrides_are_named(override: str, says: str) -> None:
    assert says in refusal(FULL, (override,))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nme: x", "nme: unknown key. Did you mean 'name'? Allowed: limits_ms, name, out, steps"),
        ("window: {}", "name: missing, and it has no default"),
        ("name: x\nwindow: {longst: 3}", "window.longst: unknown key. Did you mean 'longest'?"),
        (
            "name: x\nsteps: [{kind: merge, tao: 1}]",
            "steps.0.tao: unknown key. Did you mean 'tau'?",
        ),
        ("name: x\nsteps: [{kind: merge, keep: 1}]", "unknown key. Allowed: kind, tau."),
        ("name: x\nsteps: [{kind: fold}]", "'merge', 'drop'"),
        ("name: x\nsteps: [{kind: merge, tau: 2}]", "steps.0.tau: given 2 (int)"),
        ("name: x\nsteps: [{kind: merge, tau: 2}]", "less than or equal to 1"),
        ("name: x\nwindow: {longest: '3'}", "window.longest: given '3' (text)"),
        ("name: x\nwindow: {longest: 3.0}", "given 3.0 (float)"),
        ("name: x\nwindow: {site: layers}", "'input' or 'layer'"),
        ("name: 3", "name: given 3 (int)"),
        ("name: x\nlimits_ms: {a: fast}", "limits_ms.a: given 'fast' (text)"),
        (f"name: {'x' * 200}", "the whole config: given {'name': 'xxx"),
        (f"name: {'x' * 200}", "name has more than 100 letters."),
    ],
)
def test_wrong_values_are_explained(text: str, says: str) -> None:
    message = refusal(text)
    assert message.startswith("run.yaml is refused:")
    assert says in message
    assert "pydantic" not in message


def test_every_wrong_key_is_listed_at_once() -> None:
    message = refusal("nme: x\nwindow: {longest: -1}")
    assert len(message.splitlines()) == 4


BOMB = "a: &a [x, x]\n" + "\n".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: x\nname: y", "line 2, column 1: the key 'name' appears twice"),
        ("name: x\nwindow: {longest: 1, longest: 2}", "'longest' appears twice"),
        ("- name", "holds a list; a config is a mapping"),
        ("just words", "holds a text"),
        ("name: x\n---\nname: y", "line 2, column 1"),
        ("name: *a", "anchors and aliases are not allowed"),
        (BOMB, "anchors and aliases are not allowed"),
        ("a: &a {name: x}\n<<: *a", "anchors and aliases are not allowed"),
        ("<<: {name: x}", "<<: unknown key"),
        ("name: !!python/object/apply:os.system ['true']", "the tag tag:yaml.org,2002:python"),
        ("name: !!binary aGk=", "is not allowed; write a plain value"),
        ("name: !mine x", "the tag !mine is not allowed"),
        ("3: x", "a key must be text; put it in quotes"),
        ("? [a]\n: b", "a key must be text"),
        ("name: [", "line 1"),
        ("name: a: b", "line 1, column 8"),
        ("name: \x07", "is not YAML"),
        ("name: " + "9" * 5000, "is not YAML"),
        ("name: " + "[" * 5000, "nested too deeply"),
        ("name: " + "x" * 2_000_000, "at most a million"),
    ],
)
def test_hostile_and_broken_yaml_is_refused(text: str, says: str) -> None:
    message = refusal(text)
    assert "run.yaml" in message
    assert says in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "demo_cpu.yaml").write_text("name: x")
    (tmp_path / "picture.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ConfigError, match=r"no config at .*demo_gpu.*Did you mean .*demo_cpu"):
        load(tmp_path / "demo_gpu.yaml", Run)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path, Run)
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load(tmp_path / "picture.yaml", Run)


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
steps = st.one_of(
    st.builds(Merge, tau=st.floats(0, 1)),
    st.builds(Drop, keep=st.none() | st.integers()),
)
runs = st.builds(
    Run,
    name=text
    | st.sampled_from(
        ["1e-3", "a\x85b", "\u2028", "on", "true", "~", "", "0x1f", "=", "<<", ".inf", "- a"]
    ),
    window=st.builds(Window, longest=st.integers(min_value=1), site=st.sampled_from(Site)),
    steps=st.lists(steps, max_size=3).map(tuple),
    limits_ms=st.dictionaries(text, st.floats(allow_nan=False), max_size=3),
    out=st.none() | text.filter(lambda t: "\0" not in t).map(Path),
)


@given(runs)
def test_dump_and_parse_are_inverse(run: Run) -> None:
    again = parse(dump(run), Run)
    assert again == run
    assert content_hash(again) == content_hash(run)


@pytest.mark.parametrize("name", reducer_names())
def test_reducers_are_configs(name: str) -> None:
    reducer = reducer_class(name)()
    assert parse(dump(reducer), type(reducer)) == reducer


def test_content_hash_depends_on_values_only() -> None:
    assert content_hash(parse("{}", Window)) == content_hash(
        parse("site: input\nlongest: 16", Window)
    )
    assert content_hash(Window(longest=17)) != content_hash(Window())
    assert content_hash(Window()) == "a414973ef5b4"
