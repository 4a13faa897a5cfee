"""Every key of a cluster file, wrong once: an error names the file, the line, the key and the rule."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from resplit.config import ClusterConfig, load_cluster
from resplit.errors import ConfigError
from tests.support.cluster_file import keys_of, sections, written

# Every key of the schema.
COMPLETE = """
name: home
source: hub
nodes:
  - name: hub
    address: "127.0.0.1:7001"
    memory: 1 GiB
    max_utilization: 0.9
    compute_w: 5 W
    threads: 1
    device: cpu
    emulate:
      decode_per_token:
        embed: { fixed: 1 ms, per_session: 0 s }
        layer: { fixed: 1 ms, per_session: 1 ms }
        head: { fixed: 1 ms, per_session: 1 ms }
      prefill_per_token: { embed: 1 ms, layer: 1 ms, head: 1 ms }
      background_utilization: 0.1
  - { name: far, address: "[::1]:7002", memory: 1 GiB, compute_w: 5 W }
trusted: [hub]
classes:
  - name: chat
    slo: 1 s
    shed_late: true
    rate_rps: 1
    prompt_tokens: 8
    new_tokens: 8
    api_keys: [in-clear, { env: KEYS }]
links:
  default: { latency: 1 ms, bandwidth: 1 Gbit/s }
  pairs: [{ between: [hub, far], latency: 1 ms, bandwidth: 1 Gbit/s }]
limits:
  { context_tokens: 64, sessions: 2, queue: 3, body: 1 MiB, deadline: 10 s, copy_every: 4, drafts: 4, connections: 40 }
http: { hosts: [models.example], origins: ["https://a.example"] }
objective: { latency: 1, balance: 0, privacy: 0, energy: 0.1 }
kv_tokens: 100
weights: int4
engine: auto
split: layer
allow_special_tokens: false
private_layers: 1
"""
WRONG = ({"no": "such"}, [[]], -1, "", math.nan, math.inf, "1e999 s", "1e999 GiB")
TEXTS = ("name", "nodes.name", "classes.name", "classes.api_keys", "classes.api_keys.env")  # may be any word
Place = tuple[str | int, ...]


def places(content: Any, at: Place = ()) -> Iterator[Place]:
    """The place of each value in the file."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield (*at, key)
        yield from places(value, (*at, key))


def put(content: Any, at: Place, value: object) -> Any:
    """The file with another value at a place."""
    changed = part = copy.deepcopy(content)
    for key in at[:-1]:
        part = part[key]
    part[at[-1]] = value
    return changed


def key_of(at: Place) -> str:
    """The key at a place, without positions in lists."""
    return ".".join(each for each in at if isinstance(each, str))


FILE = yaml.safe_load(COMPLETE)
PLACES = list(places(FILE))


def refusal(folder: Path, content: object) -> str:
    with pytest.raises(ConfigError) as error:
        load_cluster(written(folder, yaml.safe_dump(content, sort_keys=False)))
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{folder / 'cluster.yaml'}:")


def test_the_complete_file_is_valid_and_has_every_key(tmp_path: Path) -> None:
    load_cluster(written(tmp_path, COMPLETE))
    keys = {key for key, field in keys_of(ClusterConfig) if not sections(field)}
    assert keys - {key_of(at) for at in PLACES} == {"classes.api_keys.sha256", "classes.api_keys.file"}


@pytest.mark.parametrize("at", PLACES, ids=lambda at: ".".join(map(str, at)))
def test_a_wrong_value_is_an_error_at_its_key(tmp_path: Path, at: Place) -> None:
    for value in WRONG:
        if value in ("1e999 s", "1e999 GiB") and key_of(at) in TEXTS:
            continue
        line, key, rule = refusal(tmp_path, put(FILE, at, value)).split(": ", 2)
        assert line.isdigit(), value
        named, wanted = re.sub(r"\.[0-9]+", "", key), key_of(at)
        assert named.startswith(wanted) or wanted == f"{named}.{at[-1]}", (value, key, rule)
        assert rule, value


@pytest.mark.parametrize("at", [at for at in PLACES if isinstance(at[-1], str)], ids=key_of)
def test_a_misspelt_key_is_an_error_at_its_line(tmp_path: Path, at: Place) -> None:
    said = refusal(tmp_path, put(FILE, (*at[:-1], f"{at[-1]}x"), 1))
    assert re.match(rf"[0-9]+: {re.escape('.'.join(map(str, at)))}x: unknown key", said), said


@pytest.mark.parametrize("number", ["kv_tokens", "private_layers"])
def test_yes_and_no_are_no_numbers(tmp_path: Path, number: str) -> None:
    assert "a number is needed, not true or false" in refusal(tmp_path, FILE | {number: True})


def test_a_key_that_no_client_can_send_is_refused(tmp_path: Path) -> None:
    for key in ("", "two words", "end\n"):
        said = refusal(tmp_path, put(FILE, ("classes", 0, "api_keys", 0), key))
        assert "classes.0.api_keys.0: a key has at least one character, and no white space" in said
