"""The JSON format of placement problems: reading, checking and writing."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from resplit.errors import ProblemFormatError
from resplit.problem import MAX_FILE_BYTES, problem_from_json, problem_to_json, read_problem
from tests.support.problems import EVERY_EXAMPLE, EXAMPLES

NULLS = EXAMPLES / "n008-llama2-7b-c2-tight-nulls-19.json"
SCHEMA = json.loads((Path(__file__).parent.parent / "docs" / "problem.schema.json").read_text())


@pytest.fixture
def raw() -> dict[str, Any]:
    return json.loads(NULLS.read_text())


@pytest.mark.parametrize("path", EVERY_EXAMPLE, ids=lambda path: path.stem)
def test_a_written_problem_equals_the_one_read(path: Path) -> None:
    written = problem_to_json(read_problem(path))

    assert json.loads(json.dumps(written, allow_nan=False)) == problem_to_json(problem_from_json(written))
    read = json.loads(path.read_text())
    for key in ("blocks", "classes", "prefill_s_per_token", "link_latency_s", "kv_tokens"):
        assert written[key] == read[key]
    assert written["weights"] == {"energy": 0.0} | read["weights"]
    for node, original in zip(written["nodes"], read["nodes"], strict=True):
        assert node == {"load_share": 1.0, "compute_w": 0.0} | {k: v for k, v in original.items() if k != "kind"}


def test_an_unknown_key_gives_one_warning(raw: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    raw["colour"] = "red"

    problem_from_json(raw)

    assert [record.getMessage() for record in caplog.records] == [
        "unknown key colour is ignored",
        "unknown key nodes[].kind is ignored",
    ]


BREAKS: list[tuple[str, tuple[Any, ...], Any]] = [
    ("version", ("version",), 2),
    ("version", ("version",), True),
    ("blocks", ("blocks",), []),
    ("blocks[0]", ("blocks", 0), "embed"),
    ("blocks[1].name", ("blocks", 1, "name"), "embed"),
    ("blocks[0].name", ("blocks", 0, "name"), ""),
    ("blocks[0].weight_bytes", ("blocks", 0, "weight_bytes"), True),
    ("blocks[0].private", ("blocks", 0, "private"), 1),
    ("blocks[0].sensitivity", ("blocks", 0, "sensitivity"), 1.5),
    ("nodes[2].background_utilization", ("nodes", 2, "background_utilization"), 1),
    ("nodes[2].max_utilization", ("nodes", 2, "max_utilization"), 1.0),
    ("nodes[2].memory_bytes", ("nodes", 2, "memory_bytes"), 10**400),
    ("nodes[1].name", ("nodes", 1, "name"), "node-0"),
    ("nodes[1].load_share", ("nodes", 1, "load_share"), 0),
    ("nodes[1].load_share", ("nodes", 1, "load_share"), 1.5),
    ("nodes[1].compute_w", ("nodes", 1, "compute_w"), -1),
    ("classes[0].rate_rps", ("classes", 0, "rate_rps"), -1),
    ("classes[0].rate_rps", ("classes", 0, "rate_rps"), 0),
    ("classes[0].prompt_tokens", ("classes", 0, "prompt_tokens"), 0),
    ("classes[0].slo_s", ("classes", 0, "slo_s"), None),
    ("classes[1].source", ("classes", 1, "source"), "nowhere"),
    ("prefill_s_per_token", ("prefill_s_per_token",), [[1.0]]),
    ("prefill_s_per_token[3]", ("prefill_s_per_token", 3), [1.0]),
    ("prefill_s_per_token[3][0]", ("prefill_s_per_token", 3, 0), "fast"),
    ("decode_s_per_token[3][0]", ("decode_s_per_token", 3, 0), float("nan")),
    ("decode_s_per_token[3][0]", ("decode_s_per_token", 3, 0), float("inf")),
    ("link_latency_s[0][1]", ("link_latency_s", 0, 1), -1e-3),
    ("link_bandwidth_bytes_per_s[0][1]", ("link_bandwidth_bytes_per_s", 0, 1), 0),
    ("kv_tokens", ("kv_tokens",), -1),
    ("token_bytes", ("token_bytes",), "4"),
    ("allowed_cuts[0]", ("allowed_cuts",), [0]),
    ("allowed_cuts[0]", ("allowed_cuts",), [34]),
    ("allowed_cuts[1]", ("allowed_cuts",), [3, 3]),
    ("allowed_cuts[0]", ("allowed_cuts",), [1.5]),
    ("allowed_cuts", ("allowed_cuts",), None),
    ("weights", ("weights",), [1, 0, 0]),
    ("weights.privacy", ("weights", "privacy"), -1),
    ("weights.energy", ("weights", "energy"), -1),
    ("current", ("current",), ["node-0"]),
    ("current[1]", ("current", 1), 7),
]


@pytest.mark.parametrize(("key", "place", "value"), BREAKS)
def test_a_broken_rule_is_named_with_its_key(raw: dict[str, Any], key: str, place: tuple[Any, ...], value: Any) -> None:
    target: Any = raw
    for step in place[:-1]:
        target = target[step]
    target[place[-1]] = value

    with pytest.raises(ProblemFormatError) as caught:
        problem_from_json(raw)

    assert caught.value.key == key
    assert caught.value.rule


@pytest.mark.parametrize("key", ["version", "blocks", "weights", "kv_tokens", "link_latency_s"])
def test_a_missing_key_is_named(raw: dict[str, Any], key: str) -> None:
    del raw[key]

    with pytest.raises(ProblemFormatError, match=f"{key} = None: this key is required"):
        problem_from_json(raw)


def test_keys_for_shared_passes_and_energy_may_be_absent(raw: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    for node in raw["nodes"]:
        del node["kind"]
    raw["weights"].pop("energy", None)

    problem = problem_from_json(raw)

    assert {(node.load_share, node.compute_w) for node in problem.nodes} == {(1.0, 0.0)}
    assert problem.weights.energy == 0.0
    assert caplog.records == []


@pytest.mark.parametrize("path", EVERY_EXAMPLE, ids=lambda path: path.stem)
def test_the_schema_accepts_every_example(path: Path) -> None:
    jsonschema.validate(json.loads(path.read_text()), SCHEMA)


@pytest.mark.parametrize("path", EVERY_EXAMPLE, ids=lambda path: path.stem)
def test_the_schema_accepts_every_written_problem(path: Path) -> None:
    jsonschema.validate(problem_to_json(read_problem(path)), SCHEMA)


def test_null_must_be_in_both_matrices_or_in_neither(raw: dict[str, Any]) -> None:
    changed = copy.deepcopy(raw)
    changed["prefill_s_per_token"][5][0] = None

    with pytest.raises(ProblemFormatError, match=r"prefill_s_per_token\[5\]\[0\]"):
        problem_from_json(changed)


def test_the_diagonal_of_the_links_is_ignored(raw: dict[str, Any]) -> None:
    raw["link_latency_s"][2][2] = None
    raw["link_bandwidth_bytes_per_s"][2][2] = 1.0

    problem_from_json(raw)


@pytest.mark.parametrize(
    "content",
    [b"", b"not json", b"[1, 2]", b"null", b"\xff\xfe\x00", b'{"version": NaN}', b"[" * 100_000, b'{"a": 1, "a": 2}',
     b'{"version": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_a_file_that_holds_no_problem_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "problem.json"
    path.write_bytes(content)

    with pytest.raises(ProblemFormatError):
        read_problem(path)


def test_a_huge_file_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(2 * MAX_FILE_BYTES)

    with pytest.raises(ProblemFormatError, match="at most 100000000 bytes"):
        read_problem(path)


def test_a_missing_file_and_a_folder_are_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(ProblemFormatError):
            read_problem(path)
