"""Where the public traces of the bundled scenarios come from, and how a scenario's files are made of them.

This repository contains none of them. Each file is made from its source at one commit, so it is the same everywhere.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from resplit.errors import DataError

__all__ = ["TRACE_FILES", "TraceFile", "fetch_trace", "state_of", "traces_command"]

_DAY_S = 86_400
_EACH_FIFTH = 5  # of PlanetLab's 490 hosts
_TIMEOUT_S = 60.0
_HOST = "https://raw.githubusercontent.com"


def _requests(sources: Sequence[bytes]) -> pd.DataFrame:
    """Seconds since the first request, and its tokens."""
    rows = pd.read_csv(io.BytesIO(sources[0]), parse_dates=["TIMESTAMP"])
    arrival_s = (rows.TIMESTAMP - rows.TIMESTAMP.iloc[0]).dt.total_seconds().round(4)
    return pd.DataFrame(
        {"arrival_s": arrival_s, "prompt_tokens": rows.ContextTokens, "output_tokens": rows.GeneratedTokens}
    )


def _background(sources: Sequence[bytes]) -> pd.DataFrame:
    """The third week: MHz used over MHz provisioned, in the intervals that end at `time_s`."""
    trace, machines = (pd.read_parquet(io.BytesIO(source)) for source in sources)
    time_s = (trace.timestamp - trace.timestamp.min()).dt.total_seconds() - 14 * _DAY_S
    provisioned = trace.id.map(machines.set_index("id").cpu_capacity)
    rows = pd.DataFrame(
        {
            "vm": trace.id,
            "time_s": time_s.astype(int),
            "duration_s": trace.duration // 1000,
            "cpu_utilization": (trace.cpu_usage / provisioned).clip(0, 1).round(4),
            "cpu_cores": trace.cpu_count,
        }
    )
    week: pd.DataFrame = rows[(time_s >= 0) & (time_s < 7 * _DAY_S)]
    return week


def _positions(sources: Sequence[bytes]) -> pd.DataFrame:
    """Sites, then users, each numbered from 0."""
    tables = []
    for kind, source in zip(("edge_server", "user"), sources, strict=True):
        places = pd.read_csv(io.BytesIO(source)).rename(columns=str.lower)[["latitude", "longitude"]]
        if kind == "user":  # drawn at random: a decimetre is enough
            places = places.round(6)
        tables.append(pd.DataFrame({"kind": kind, "id": range(len(places)), **places}))
    return pd.concat(tables)


def _round_trips(sources: Sequence[bytes]) -> pd.DataFrame:
    """The median and the maximum over the slices (ms), for each pair of each fifth host."""
    slices = [np.loadtxt(io.BytesIO(source))[::_EACH_FIFTH, ::_EACH_FIFTH] for source in sources]
    over_time = np.stack(slices)  # (slices, hosts, hosts)
    one, other = np.triu_indices(over_time.shape[1], k=1)
    pairs = over_time[:, one, other]  # (slices, pairs)
    return pd.DataFrame(
        {
            "node_a": one * _EACH_FIFTH,
            "node_b": other * _EACH_FIFTH,
            "rtt_median_ms": np.median(pairs, axis=0).round(4),
            "rtt_max_ms": pairs.max(axis=0).round(4),
        }
    )


@dataclass(frozen=True)
class TraceFile:
    """A file that scenarios read: its source on GitHub, how it is made, and the SHA-256 of its text, uncompressed."""

    name: str
    repository: str
    commit: str
    paths: tuple[str, ...]
    licence: str
    made: str
    table: Callable[[Sequence[bytes]], pd.DataFrame]
    sha256: str

    @property
    def urls(self) -> list[str]:
        """The addresses of its sources."""
        return [f"{_HOST}/{self.repository}/{self.commit}/{path}" for path in self.paths]


TRACE_FILES = (
    TraceFile(
        "llm_azure2023_conv.csv",
        "Azure/AzurePublicDataset",
        "b469a113cedca53ddc3bdea71a143dc4b7d8700c",
        ("data/AzureLLMInferenceTrace_conv.csv",),
        "CC-BY-4.0",
        "seconds since the first request",
        _requests,
        "77abb6cf0996b3643c7ffdb5f122884a426c4b28c1e1956c62eb934667c45c55",
    ),
    TraceFile(
        "node_bitbrains_week.csv.gz",
        "atlarge-research/opendc",
        "691036deb92b9e236d1a33c6f3066f98a96ba0e6",
        tuple(
            f"opendc-experiments/opendc-experiments-base/src/main/resources/bitbrains-small/trace/{table}.parquet"
            for table in ("trace", "meta")
        ),
        "MIT; data: Grid Workloads Archive, GWA-T-12 (Shen et al., CCGrid 2015)",
        "days 15 to 21; MHz used over MHz provisioned",
        _background,
        "068879c2f79234036389c3b48d8aa7e33bd185d651c462359839330e0a76a5db",
    ),
    TraceFile(
        "rtt_planetlab_pairs.csv.gz",
        "uofa-rzhu3/NetLatency-Data",
        "a5845579654bf3b7f191d2697c0de24ec485b8e9",
        tuple(f"PlanetLab/PlanetLabData_{number}" for number in range(1, 19)),
        "MIT",
        "median and maximum over the slices, each fifth host",
        _round_trips,
        "c833944e878356bc8e48e53a4341e8cce2b515987ffb80fad24a69aae82f529f",
    ),
    TraceFile(
        "topo_eua_melbourne_cbd.csv",
        "swinedge/eua-dataset",
        "61238e00a6f01019c8a6ba1619675337a879a3d4",
        ("edge-servers/site-optus-melbCBD.csv", "users/users-melbcbd-generated.csv"),
        "MIT; site data (c) ACMA",
        "positions only: sites, then users",
        _positions,
        "8da8ee2186013cdfd466375d7a085ea8ed2a8614741dbe8f2cfa7a708a1f631a",
    ),
)


def state_of(trace: TraceFile, folder: Path) -> str:
    """Whether a folder has a trace as it is made from its source: "there", "missing" or "another one"."""
    path = folder / trace.name
    if not path.exists():
        return "missing"
    content = path.read_bytes()
    try:
        text = gzip.decompress(content) if path.suffix == ".gz" else content
    except OSError:
        return "another one"
    return "there" if hashlib.sha256(text).hexdigest() == trace.sha256 else "another one"


def fetch_trace(trace: TraceFile, folder: Path, download: Callable[[str], bytes]) -> Path:
    """Make a trace file in `folder` from its source. DataError if it is not there, or if something else comes out."""
    try:
        text = trace.table([download(url) for url in trace.urls]).to_csv(index=False).encode()
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        raise DataError(f"{trace.name}: cannot be made from {trace.urls[0]}: {error}") from None
    found = hashlib.sha256(text).hexdigest()
    if found != trace.sha256:
        raise DataError(f"{trace.name}: what was made of {trace.urls[0]} has SHA-256 {found}, not {trace.sha256}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / trace.name
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
    return path


def traces_command(folder: Path, fetch: bool) -> list[str]:
    """Lines that say where each trace comes from and whether `folder` has it; with `fetch`, missing ones are made."""
    lines = []
    for trace in TRACE_FILES:
        state = state_of(trace, folder)
        if fetch and state != "there":
            fetch_trace(trace, folder, _download)
            state = "fetched"
        lines += [f"{trace.name}: {state}", *(f"  {url}" for url in trace.urls[:2])]
        if more := len(trace.urls) - 2:
            lines += [f"  and {more} more beside them"] if more > 0 else []
        lines += [f"  made: {trace.made}", f"  licence: {trace.licence}", f"  SHA-256 of its text: {trace.sha256}"]
    if not fetch:
        lines.append(f"`resplit traces --fetch` downloads what is missing, and makes the files in {folder}.")
    return lines


def _download(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
        content: bytes = answer.read()
        return content
