"""YAML files with a schema: read once, with errors that name file, line, key and rule."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from resplit.errors import ConfigError

__all__ = ["Strict", "first_error", "known", "load_file", "unique"]

_TYPE_NAME = re.compile(r"\[|^[A-Z]")
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
        location, rule = first_error(error)
        place = f"{path}:{_line(document, location)}" + (f": {'.'.join(map(str, location))}" if location else "")
        raise ConfigError(place, rule) from None


def first_error(error: ValidationError) -> tuple[tuple[int | str, ...], str]:
    """Key and rule of the first error; a misspelt key comes before the key that is missing because of it.

    Where a key may have a value of two types, an error inside of one of them comes before that it is not the other.
    """
    errors = sorted(error.errors(), key=lambda each: each["type"] == "missing")
    first = _keys(errors[0]["loc"])
    inside = [each for each in errors if each["type"] != "missing" and _keys(each["loc"])[:-1] == first]
    chosen = (inside or errors)[0]
    location = _keys(chosen["loc"])
    rule = chosen["msg"].removeprefix("Value error, ")
    if not location and ": " in rule:  # a rule over the whole file names its key in the message
        key, rule = rule.split(": ", 1)
        location = tuple(key.split("."))
    return location, rule


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
