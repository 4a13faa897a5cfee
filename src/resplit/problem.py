"""Reads, checks and writes placement problems and plans in the JSON format of docs/problem.md."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Collection, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np

from resplit.errors import ProblemFormatError
from resplit.types import Block, FloatArray, Node, Plan, Problem, RequestClass, Weights

MAX_FILE_BYTES = 100_000_000

_BLOCK_KEYS = ("name", "weight_bytes", "kv_bytes_per_token", "activation_bytes_per_token", "private", "sensitivity")
_NODE_KEYS = ("name", "memory_bytes", "background_utilization", "max_utilization", "trusted")
_OPTIONAL_NODE_KEYS = ("load_share", "compute_w")
_CLASS_KEYS = ("name", "source", "rate_rps", "prompt_tokens", "new_tokens")
_WEIGHT_KEYS = ("latency", "balance", "privacy")
_OPTIONAL_WEIGHT_KEYS = ("energy",)
_PROBLEM_KEYS = ("version", "blocks", "nodes", "classes", "prefill_s_per_token", "decode_s_per_token",
                 "link_latency_s", "link_bandwidth_bytes_per_s", "kv_tokens", "weights")  # fmt: skip
_OPTIONAL_PROBLEM_KEYS = ("token_bytes", "allowed_cuts", "current")
_TOLERATED_KEYS = ("known",)  # the proven optimum of an example

_log = logging.getLogger(__name__)


def read_problem(path: Path) -> Problem:
    """Read the problem in the file at `path`, or on standard input if that is `-`.

    Raises ProblemFormatError; unknown keys are logged as warnings.
    """
    try:
        with sys.stdin.buffer if str(path) == "-" else path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ProblemFormatError(str(path), len(content), f"a problem file has at most {MAX_FILE_BYTES} bytes")
        text = content.decode()
    except OSError as error:
        raise ProblemFormatError("file", str(path), f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ProblemFormatError(str(path), error.reason, "text in UTF-8") from error
    try:
        return problem_from_json(json.loads(text, object_pairs_hook=_object_of_pairs))
    except (ValueError, RecursionError) as error:
        raise ProblemFormatError(str(path), text[:40], f"is not JSON: {error}") from error


def problem_from_json(obj: object) -> Problem:
    """Make a problem from a decoded JSON value. Raises ProblemFormatError with the key, the value and the rule."""
    unknown: dict[str, None] = {}
    raw = _members(obj, "", _PROBLEM_KEYS, (*_OPTIONAL_PROBLEM_KEYS, *_TOLERATED_KEYS), unknown)
    if _number(raw["version"], "version") != 1:
        raise ProblemFormatError("version", raw["version"], "version is 1")
    blocks = tuple(_block(item, f"blocks[{j}]", unknown) for j, item in enumerate(_array(raw["blocks"], "blocks", 1)))
    nodes = tuple(_node(item, f"nodes[{i}]", unknown) for i, item in enumerate(_array(raw["nodes"], "nodes", 1)))
    names = _unique([node.name for node in nodes], "nodes")
    _unique([block.name for block in blocks], "blocks")
    classes = tuple(
        _request_class(item, f"classes[{r}]", names, unknown)
        for r, item in enumerate(_array(raw["classes"], "classes", 1))
    )
    _unique([request_class.name for request_class in classes], "classes")
    times = _matrix_pair(raw, "prefill_s_per_token", "decode_s_per_token", (len(blocks), len(nodes)))
    links = _matrix_pair(raw, "link_latency_s", "link_bandwidth_bytes_per_s", (len(nodes), len(nodes)))
    problem = Problem(
        blocks, nodes, classes, *times, *links,
        kv_tokens=_number(raw["kv_tokens"], "kv_tokens", minimum=0),
        weights=_weights(raw["weights"], unknown),
        token_bytes=_number(raw.get("token_bytes", 4), "token_bytes", minimum=0),
        allowed_cuts=_cuts(raw["allowed_cuts"], len(blocks)) if "allowed_cuts" in raw else None,
        current=_current(raw["current"], len(blocks)) if "current" in raw else None,
    )  # fmt: skip
    for key in unknown:
        _log.warning("unknown key %s is ignored", key)
    return problem


def problem_to_json(problem: Problem) -> dict[str, Any]:
    """Write `problem` as a JSON object; optional fields that are None are left out."""
    obj: dict[str, Any] = {
        "version": 1,
        "blocks": [asdict(block) for block in problem.blocks],
        "nodes": [asdict(node) for node in problem.nodes],
        "classes": [
            {key: value for key, value in asdict(request_class).items() if value is not None}
            for request_class in problem.classes
        ],
        "prefill_s_per_token": _nullable(problem.prefill_s_per_token),
        "decode_s_per_token": _nullable(problem.decode_s_per_token),
        "link_latency_s": _nullable(problem.link_latency_s),
        "link_bandwidth_bytes_per_s": _nullable(problem.link_bandwidth_bytes_per_s),
        "kv_tokens": problem.kv_tokens,
        "token_bytes": problem.token_bytes,
        "weights": asdict(problem.weights),
    }
    if problem.allowed_cuts is not None:
        obj["allowed_cuts"] = sorted(problem.allowed_cuts)
    if problem.current is not None:
        obj["current"] = list(problem.current)
    return obj


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """Write `plan` as the JSON object of an answer."""
    obj = asdict(plan)
    if plan.placement is None:
        obj["segments"] = None
    return obj


def _object_of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    obj = dict(pairs)
    if len(obj) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ProblemFormatError(repeated, repeated, "each key may appear once in an object")
    return obj


def _members(
    obj: object, key: str, required: Iterable[str], optional: Iterable[str], unknown: dict[str, None]
) -> dict[str, Any]:
    """Check that `obj` is an object with all `required` keys; keys that are not listed are added to `unknown`."""
    if not isinstance(obj, dict):
        raise ProblemFormatError(key or "problem", obj, "an object")
    prefix = f"{key}." if key else ""
    for name in required:
        if name not in obj:
            raise ProblemFormatError(f"{prefix}{name}", None, "this key is required")
    family = prefix if "[" not in prefix else prefix[: prefix.index("[")] + "[]."
    unknown.update(dict.fromkeys(f"{family}{name}" for name in obj if name not in {*required, *optional}))
    return cast("dict[str, Any]", obj)


def _array(value: object, key: str, minimum_length: int) -> list[Any]:
    if not isinstance(value, list):
        raise ProblemFormatError(key, value, "an array")
    if len(value) < minimum_length:
        raise ProblemFormatError(key, value, f"at least {minimum_length} entry")
    return value


def _text(value: object, key: str) -> str:
    if not isinstance(value, str) or not value:
        raise ProblemFormatError(key, value, "a non-empty string")
    return value


def _flag(value: object, key: str) -> bool:
    if not isinstance(value, bool):
        raise ProblemFormatError(key, value, "true or false")
    return value


def _number(
    value: object, key: str, *, minimum: float = -math.inf, above: float = -math.inf,
    maximum: float = math.inf, below: float = math.inf,
) -> float:  # fmt: skip
    """Check that `value` is a finite number with minimum <= value <= maximum and above < value < below."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ProblemFormatError(key, value, "a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ProblemFormatError(key, number, "a finite number")
    for broken, rule in (
        (number < minimum, f"at least {minimum:g}"),
        (number <= above, f"above {above:g}"),
        (number > maximum, f"at most {maximum:g}"),
        (number >= below, f"below {below:g}"),
    ):
        if broken:
            raise ProblemFormatError(key, value, rule)
    return number


def _block(obj: object, key: str, unknown: dict[str, None]) -> Block:
    raw = _members(obj, key, _BLOCK_KEYS, (), unknown)
    return Block(
        name=_text(raw["name"], f"{key}.name"),
        weight_bytes=_number(raw["weight_bytes"], f"{key}.weight_bytes", minimum=0),
        kv_bytes_per_token=_number(raw["kv_bytes_per_token"], f"{key}.kv_bytes_per_token", minimum=0),
        activation_bytes_per_token=_number(
            raw["activation_bytes_per_token"], f"{key}.activation_bytes_per_token", minimum=0
        ),
        private=_flag(raw["private"], f"{key}.private"),
        sensitivity=_number(raw["sensitivity"], f"{key}.sensitivity", minimum=0, maximum=1),
    )


def _node(obj: object, key: str, unknown: dict[str, None]) -> Node:
    raw = _members(obj, key, _NODE_KEYS, _OPTIONAL_NODE_KEYS, unknown)
    return Node(
        name=_text(raw["name"], f"{key}.name"),
        memory_bytes=_number(raw["memory_bytes"], f"{key}.memory_bytes", minimum=0),
        background_utilization=_number(raw["background_utilization"], f"{key}.background_utilization",
                                       minimum=0, below=1),
        max_utilization=_number(raw["max_utilization"], f"{key}.max_utilization", minimum=0, below=1),
        trusted=_flag(raw["trusted"], f"{key}.trusted"),
        load_share=_number(raw.get("load_share", 1), f"{key}.load_share", above=0, maximum=1),
        compute_w=_number(raw.get("compute_w", 0), f"{key}.compute_w", minimum=0),
    )  # fmt: skip


def _request_class(obj: object, key: str, nodes: Collection[str], unknown: dict[str, None]) -> RequestClass:
    raw = _members(obj, key, _CLASS_KEYS, ("slo_s",), unknown)
    source = _text(raw["source"], f"{key}.source")
    if source not in nodes:
        raise ProblemFormatError(f"{key}.source", source, "the name of a node")
    return RequestClass(
        name=_text(raw["name"], f"{key}.name"),
        source=source,
        rate_rps=_number(raw["rate_rps"], f"{key}.rate_rps", above=0),
        prompt_tokens=_number(raw["prompt_tokens"], f"{key}.prompt_tokens", minimum=1),
        new_tokens=_number(raw["new_tokens"], f"{key}.new_tokens", minimum=1),
        slo_s=_number(raw["slo_s"], f"{key}.slo_s", above=0) if "slo_s" in raw else None,
    )


def _weights(obj: object, unknown: dict[str, None]) -> Weights:
    raw = _members(obj, "weights", _WEIGHT_KEYS, _OPTIONAL_WEIGHT_KEYS, unknown)
    keys = (*_WEIGHT_KEYS, *_OPTIONAL_WEIGHT_KEYS)
    return Weights(**{key: _number(raw.get(key, 0), f"weights.{key}", minimum=0) for key in keys})


def _unique(names: list[str], key: str) -> set[str]:
    seen: set[str] = set()
    for index, name in enumerate(names):
        if name in seen:
            raise ProblemFormatError(f"{key}[{index}].name", name, "a name that no other entry has")
        seen.add(name)
    return seen


def _matrix_pair(raw: dict[str, Any], first: str, second: str, shape: tuple[int, int]) -> tuple[FloatArray, FloatArray]:
    """Two matrices of `shape`, with NaN for null. Both must be null in the same places."""
    bandwidth = second.startswith("link_bandwidth")
    left = _matrix(raw[first], first, shape, positive=False)
    right = _matrix(raw[second], second, shape, positive=bandwidth)
    differ = np.isnan(left) != np.isnan(right)
    if bandwidth:
        np.fill_diagonal(differ, False)  # the format ignores the diagonal of the links
    if differ.any():
        row, column = (int(index) for index in np.argwhere(differ)[0])
        key = first if np.isnan(left[row, column]) else second
        raise ProblemFormatError(f"{key}[{row}][{column}]", None, f"null in both {first} and {second} or in neither")
    return left, right


def _matrix(value: object, key: str, shape: tuple[int, int], *, positive: bool) -> FloatArray:
    rows = _array(value, key, 1)
    if len(rows) != shape[0]:
        raise ProblemFormatError(key, f"{len(rows)} rows", f"{shape[0]} rows")
    bounds = {"above": 0.0} if positive else {"minimum": 0.0}
    matrix = np.full(shape, np.nan)
    for i, row in enumerate(rows):
        if len(_array(row, f"{key}[{i}]", 1)) != shape[1]:
            raise ProblemFormatError(f"{key}[{i}]", f"{len(row)} entries", f"{shape[1]} entries")
        for k, entry in enumerate(row):
            if entry is not None:
                matrix[i, k] = _number(entry, f"{key}[{i}][{k}]", **bounds)
    return matrix


def _cuts(value: object, blocks: int) -> frozenset[int]:
    cuts: set[int] = set()
    for index, entry in enumerate(_array(value, "allowed_cuts", 0)):
        key = f"allowed_cuts[{index}]"
        cut = _number(entry, key)
        if not cut.is_integer() or not 1 <= cut <= blocks - 1:
            raise ProblemFormatError(key, entry, f"an integer in 1..{blocks - 1} (blocks less one)")
        if int(cut) in cuts:
            raise ProblemFormatError(key, entry, "each cut may appear once")
        cuts.add(int(cut))
    return frozenset(cuts)


def _current(value: object, blocks: int) -> tuple[str, ...]:
    names = _array(value, "current", 0)
    if len(names) != blocks:
        raise ProblemFormatError("current", f"{len(names)} entries", f"one node name for each of {blocks} blocks")
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise ProblemFormatError(f"current[{index}]", name, "a string")
    return tuple(names)


def _nullable(matrix: FloatArray) -> list[list[float | None]]:
    return [[None if math.isnan(entry) else entry for entry in row] for row in matrix.tolist()]
