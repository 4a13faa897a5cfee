"""YAML files with a schema: read once, with errors that name file, line, key and rule."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from resplit.errors import ConfigError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

__all__ = ["Strict", "first_error", "known", "load_file", "unique"]

_TYPE_NAME = re.compile(r"\[|^[A-Z]")
_SUBJECT = re.compile(r"^(Input|String|List|Value) (?=should )")
_SECRET = "api_keys"  # a message never shows what stands below this key
_File = TypeVar("_File", bound=BaseModel)


class Strict(BaseModel):
    """A part of a file: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def load_file(path: Path, schema: type[_File]) -> _File:
    """Read a file by its schema; ConfigError names file, line, key and rule."""
    try:
        text = path.read_text(encoding="utf-8")
        document = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}", f"is not YAML: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"is not YAML: {' '.join(str(error).split())}") from None
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        location, rule = first_error(error, schema)
        place = f"{path}:{_line(document, location)}" + (f": {'.'.join(map(str, location))}" if location else "")
        raise ConfigError(place, rule) from None


def first_error(error: ValidationError, schema: type[BaseModel]) -> tuple[tuple[int | str, ...], str]:
    """Key and rule of the first error; a misspelt key comes before the key that is missing because of it.

    Where a key may have a value of two types, an error inside of one of them comes before that it is not the other.
    """
    errors = sorted(error.errors(), key=lambda each: each["type"] == "missing")
    first = _keys(errors[0]["loc"])
    inside = [each for each in errors if each["type"] != "missing" and _keys(each["loc"])[:-1] == first]
    chosen = (inside or errors)[0]
    location, rule = _keys(chosen["loc"]), _rule(chosen, schema)
    if not location and ": " in rule:  # a rule over the whole file names its key in the message
        key, rule = rule.split(": ", 1)
        location = tuple(key.split("."))
    return location, rule


def _rule(error: ErrorDetails, schema: type[BaseModel]) -> str:
    """What is wrong, in plain words, with the value."""
    kind, shown = error["type"], _shown(error["input"])
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(error["loc"][-1]), _all_keys(schema), 1)
        return f"unknown key; do you mean {near[0]}?" if near else "unknown key"
    if kind == "missing":
        return "this key is missing"
    if kind in ("model_type", "dict_type"):
        return f"needs keys with values, as in `name: home`, and is {shown}"
    if kind == "value_error":
        return error["msg"].removeprefix("Value error, ")
    rule = _SUBJECT.sub("", error["msg"])
    if _SECRET in error["loc"]:
        return f"the value {rule}" if rule.startswith("should") else rule
    return f"{shown} {rule}" if rule.startswith("should") else f"{shown}: {rule}"


def _shown(value: object) -> str:
    """A value in a message. What a list or a section has inside may be secret."""
    return {list: "a list", dict: "a section", type(None): "nothing"}.get(type(value), f"{value!r:.80}")


def _all_keys(schema: type[BaseModel]) -> list[str]:
    """All keys that the parts of a file may have."""
    described = schema.model_json_schema()
    parts = [described, *described.get("$defs", {}).values()]
    return [key for part in parts for key in part.get("properties", {})]


def _keys(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The keys on the way to an error. Of two types, pydantic adds the name; no key has such a name."""
    return tuple(part for part in location if not (isinstance(part, str) and _TYPE_NAME.search(part)))


def _line(node: yaml.Node | None, location: tuple[int | str, ...]) -> int:
    """The line, from 1, of the deepest part of `location` that the document contains."""
    line = 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            entry = next(((key, value) for key, value in node.value if key.value == part), None)
            if entry is None:
                break
            key, node = entry
            line = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line


def unique(key: str, names: list[str]) -> None:
    """ValueError if a name of `key` appears twice."""
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{key}: the name {twice[0]!r} appears twice; names must be unique")


def known(key: str, named: Sequence[str], names: list[str]) -> None:
    """ValueError if `key` names something that is not among `names`."""
    if unknown := [name for name in named if name not in names]:
        raise ValueError(f"{key}: {unknown[0]!r} is not in this cluster; it has {', '.join(names)}")
