"""Strict YAML in and out of frozen pydantic models.

The dialect is small on purpose: one mapping, text keys, no duplicates, no tags, anchors or aliases.
Plain scalars follow YAML 1.2: only true and false are booleans (`on` and `no` are text), 1e-3 is a
number, and a date is text. Values are not coerced: "3" is no integer.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from .errors import ConfigError

Key = str | int
LARGEST_BYTES = 1 << 20


class Config(BaseModel):
    """Base of every config. Use tuples for sequences: a frozen model cannot freeze a list."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)


def load[M: BaseModel](path: str | Path, model: type[M], overrides: Sequence[str] = ()) -> M:
    """Read a YAML file into `model`; an empty file gives the defaults.

    model: a `Config`, or any pydantic model that forbids extra keys, such as a reducer.
    overrides: `a.b=3`, applied in order on top of the file. The value is YAML, a number in the path
        is a position in a list, and the empty value is null.

    Raises ConfigError with the file, the key, what was given and what is allowed, for every wrong
    key at once.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        text = data.decode()
    except FileNotFoundError:
        near = [str(p) for p in sorted(path.parent.glob("*.yaml"))]
        raise ConfigError(f"There is no config at {path}.{_nearest(str(path), near)}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason}); is it a config?") from error
    return parse(text, model, overrides, origin=str(path))


def parse[M: BaseModel](
    text: str, model: type[M], overrides: Sequence[str] = (), *, origin: str = "config"
) -> M:
    """`load` for text at hand; `origin` names it in errors."""
    data = _read(text, origin)
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"{origin} holds a {_kind(data)}; a config is a mapping of keys to values."
        )
    given = [_apply(data, override) for override in overrides]
    try:
        return model.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False)
        lines = [_explain(model, data, detail, overrides, given) for detail in details]
        raise ConfigError("\n  ".join([f"{origin} is refused:", *lines])) from None


def dump(model: BaseModel) -> str:
    """YAML that `load` reads back to an equal model; every field is spelled out."""
    return yaml.dump(
        model.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True
    )


def content_hash(model: BaseModel) -> str:
    """12 hex digits that depend on the values only, not on their order or on what was a default."""
    canonical = json.dumps(model.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


_SCALARS = {
    "null": (r"~|null|", ["~", "n", ""]),
    "bool": (r"true|false", ["t", "f"]),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.inf|\.nan",
        list("-+.0123456789"),
    ),
}


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) is not None:
            self._refuse("anchors and aliases are not allowed; write the value out", event)
        if getattr(event, "tag", None) is not None:
            self._refuse(f"the tag {event.tag} is not allowed; write a plain value", event)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not (isinstance(key, yaml.ScalarNode) and key.tag.endswith(":str")):
                self._refuse("a key must be text; put it in quotes", key)
            if key.value in seen:
                self._refuse(f"the key {key.value!r} appears twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    @staticmethod
    def _refuse(problem: str, at: Any) -> None:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Text; Unicode line breaks are escaped, since a reader folds them into spaces."""
        breaks = not {"\x85", "\u2028", "\u2029"}.isdisjoint(data)
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if breaks else None)


_Dumper.add_representer(str, _Dumper.represent_str)


for _side in (_Loader, _Dumper):
    _side.yaml_implicit_resolvers = {}
    for _name, (_pattern, _first) in _SCALARS.items():
        _side.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), _first
        )


def _read(text: str, origin: str) -> Any:
    """The one document of `text` as plain data."""
    if len(text) > LARGEST_BYTES:
        raise ConfigError(f"{origin} has {len(text)} characters; a config has at most a million.")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{origin}{where}: {error.problem}.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{origin} is not YAML: {error}.") from error
    except RecursionError:
        raise ConfigError(f"{origin} is nested too deeply to be a config.") from None


def _apply(data: dict[str, Any], override: str) -> tuple[Key, ...]:
    """Set one dotted `a.b=3` in `data`; returns the path it set."""
    dotted, equals, value = override.partition("=")
    names = dotted.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"The override {override!r} must look like key=value or a.b=value.")
    holder: Any = data
    path: list[Key] = []
    for last, name in zip([False] * (len(names) - 1) + [True], names, strict=True):
        key: Key = name
        if isinstance(holder, list):
            if not name.isdecimal() or int(name) >= len(holder):
                raise ConfigError(
                    f"The override {override!r}: {_dotted(path)} is a list of {len(holder)}, "
                    f"so {name!r} must be a position from 0 to {len(holder) - 1}."
                )
            key = int(name)
        elif not isinstance(holder, dict):
            raise ConfigError(
                f"The override {override!r}: {_dotted(path)} is {holder!r}, which has no keys."
            )
        path.append(key)
        if last:
            holder[key] = _read(value, f"the override {override!r}")
        else:
            if isinstance(holder, dict) and holder.get(name) is None:
                holder[key] = {}
            holder = holder[key]
    return tuple(path)


def _explain(
    model: type[BaseModel],
    data: Mapping[str, Any],
    detail: ErrorDetails,
    overrides: Sequence[str],
    given: Sequence[tuple[Key, ...]],
) -> str:
    """One line of an error: where, what was given, what is allowed."""
    path = _path(data, detail["loc"])
    source = next(
        (
            f" (override {o!r})"
            for o, p in zip(overrides, given, strict=True)
            if path[: len(p)] == p
        ),
        "",
    )
    where = f"{_dotted(path)}{source}" if path else "the whole config"
    if detail["type"] == "extra_forbidden":
        allowed = _keys_at(model, detail["loc"][:-1])
        known = f" Allowed: {', '.join(allowed)}." if allowed else ""
        return f"{where}: unknown key.{_nearest(str(path[-1]), allowed)}{known}"
    if detail["type"] == "missing":
        return f"{where}: missing, and it has no default."
    shown = repr(detail["input"])
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    message = detail["msg"].removeprefix("Value error, ").rstrip(".")
    return f"{where}: given {shown} ({_kind(detail['input'])}). {message}."


def _path(data: Any, location: Iterable[Key]) -> tuple[Key, ...]:
    """`location` without the names of union members that pydantic puts between the keys."""
    location = tuple(location)
    path: list[Key] = []
    for i, key in enumerate(location):
        inside = isinstance(data, dict) and key in data
        inside |= isinstance(data, list) and isinstance(key, int) and key < len(data)
        if inside:
            data = data[key]
        if inside or (i == len(location) - 1 and isinstance(data, dict)):
            path.append(key)
    return tuple(path)


def _keys_at(model: type[BaseModel], location: Iterable[Key]) -> list[str]:
    """The keys that the model at `location` takes; none when it is not clear which model it is."""
    models = [model]
    for key in location:
        fields = [m.model_fields[str(key)] for m in models if str(key) in m.model_fields]
        if fields:
            models = [m for f in fields for m in _models_in(f.annotation)]
        else:
            models = [m for m in models if _is_member(m, key)] or models
    return sorted({name for m in models for name in m.model_fields})


def _is_member(model: type[BaseModel], name: Key) -> bool:
    """Whether a union calls `model` by `name`: its class, or the literal that tells it apart."""
    return model.__name__ == name or any(
        name in get_args(field.annotation) for field in model.model_fields.values()
    )


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in get_args(annotation) for m in _models_in(part)]


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _dotted(path: Iterable[Key]) -> str:
    return ".".join(map(str, path))


def _kind(value: Any) -> str:
    names = {dict: "mapping", list: "list", str: "text", bool: "boolean", type(None): "null"}
    return names.get(type(value), type(value).__name__)
