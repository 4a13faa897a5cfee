"""The public traces of scenarios: said where they are, and made from their sources, bit for bit."""

from __future__ import annotations

import gzip
import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from resplit import trace_files
from resplit.cli import app
from resplit.errors import DataError
from resplit.scenario import load_scenario
from resplit.trace_files import TRACE_FILES, TraceFile, fetch_trace, state_of

BY_NAME = {trace.name: trace for trace in TRACE_FILES}
REQUESTS = (
    b"TIMESTAMP,ContextTokens,GeneratedTokens\n"
    b"2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
)
SITES = b"SITE_ID,LATITUDE,LONGITUDE,NAME\n10,-37.81517,144.97476,Spring\n"
USERS = b"Latitude,Longitude\n-37.814619463998895,144.9744434939978\n"


def made_of(trace: TraceFile, *sources: bytes) -> str:
    return trace.table(sources).to_csv(index=False)


def test_requests_count_from_the_first_one() -> None:
    text = made_of(BY_NAME["llm_azure2023_conv.csv"], REQUESTS)
    assert text == "arrival_s,prompt_tokens,output_tokens\n0.0,374,44\n4.3146,396,109\n"


def test_positions_are_sites_and_then_users() -> None:
    text = made_of(BY_NAME["topo_eua_melbourne_cbd.csv"], SITES, USERS)
    rows = ["edge_server,0,-37.81517,144.97476", "user,0,-37.814619,144.974443"]
    assert text.splitlines() == ["kind,id,latitude,longitude", *rows]


def test_round_trips_are_medians_over_the_slices_between_each_fifth_host() -> None:
    def hosts(ms: float) -> bytes:
        return b"\n".join(b"\t".join(b"%g" % (ms if i != k else 0) for k in range(11)) for i in range(11))

    text = made_of(BY_NAME["rtt_planetlab_pairs.csv.gz"], hosts(4), hosts(6), hosts(20))
    assert text.splitlines()[1:] == ["0,5,6.0,20.0", "0,10,6.0,20.0", "5,10,6.0,20.0"]


def test_background_is_that_of_the_third_week(tmp_path: Path) -> None:
    start = pd.Timestamp("2013-08-12 13:40:46", tz="UTC")
    at = [start, start + pd.Timedelta(days=14, seconds=125), start + pd.Timedelta(days=21, seconds=1)]
    trace = pd.DataFrame({"id": "7", "timestamp": at, "duration": 300_000, "cpu_count": 2, "cpu_usage": 50.0})
    machines = pd.DataFrame({"id": ["7"], "cpu_capacity": [200.0]})
    for name, table in (("trace", trace), ("meta", machines)):
        table.to_parquet(tmp_path / name)
    text = made_of(
        BY_NAME["node_bitbrains_week.csv.gz"], (tmp_path / "trace").read_bytes(), (tmp_path / "meta").read_bytes()
    )
    assert text.splitlines()[1:] == ["7,125,300,0.25,2"]


@pytest.mark.parametrize("name", ["requests.csv", "requests.csv.gz"])
def test_what_is_made_has_the_checksum_that_is_stated(tmp_path: Path, name: str) -> None:
    source = BY_NAME["llm_azure2023_conv.csv"]
    right = hashlib.sha256(made_of(source, REQUESTS).encode()).hexdigest()
    trace = replace(source, name=name, sha256=right)
    assert state_of(trace, tmp_path) == "missing"
    path = fetch_trace(trace, tmp_path / "new", lambda url: REQUESTS)
    assert state_of(trace, tmp_path / "new") == "there"
    assert pd.read_csv(path).prompt_tokens.tolist() == [374, 396]
    path.write_bytes(gzip.compress(b"other") if name.endswith(".gz") else b"other")
    assert state_of(trace, tmp_path / "new") == "another one"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (REQUESTS, "has SHA-256 [0-9a-f]{64}, not 77abb6cf"),
        (b"404: Not Found", "cannot be made from https://raw.githubusercontent.com/Azure/"),
    ],
)
def test_another_source_is_refused_and_leaves_nothing(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fetch_trace(BY_NAME["llm_azure2023_conv.csv"], tmp_path, lambda url: content)
    assert not list(tmp_path.iterdir())


def test_every_trace_of_a_bundled_scenario_has_a_source_that_the_command_names(tmp_path: Path) -> None:
    files = set()
    for path in Path("data/scenarios").glob("*.yaml"):
        scenario = load_scenario(path)
        files |= {Path(trace.file).name for trace in scenario.traces}
        if scenario.area is not None:
            files |= {Path(scenario.area.positions).name, Path(scenario.area.round_trips).name}
    assert files == set(BY_NAME)
    answer = CliRunner().invoke(app, ["traces", "--folder", str(tmp_path)])
    assert answer.exit_code == 0, answer.output
    for trace in TRACE_FILES:
        assert f"{trace.name}: missing" in answer.output
        assert trace.urls[0] in answer.output
        assert trace.sha256 in answer.output


@contextmanager
def served(path: str, content: bytes, missing_bytes: int = 0) -> Iterator[str]:
    """The address of a server with `content` at `path`; it breaks off `missing_bytes` before the declared end."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == path else 404)
            self.send_header("Content-Length", str(len(content) + missing_bytes))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def requests_trace(monkeypatch: pytest.MonkeyPatch) -> TraceFile:
    """The only trace that the command knows: `REQUESTS`, as Azure's trace is stored."""
    source = BY_NAME["llm_azure2023_conv.csv"]
    trace = replace(source, sha256=hashlib.sha256(made_of(source, REQUESTS).encode()).hexdigest())
    monkeypatch.setattr(trace_files, "TRACE_FILES", (trace,))
    return trace


def path_of(trace: TraceFile) -> str:
    return f"/{trace.repository}/{trace.commit}/{trace.paths[0]}"


def test_the_command_fetches_over_http_what_is_missing_and_only_that(
    tmp_path: Path, requests_trace: TraceFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["traces", "--fetch", "--folder", str(tmp_path)]
    with served(path_of(requests_trace), REQUESTS) as address:
        monkeypatch.setattr(trace_files, "_HOST", address)
        first = CliRunner().invoke(app, command)
    assert f"{requests_trace.name}: fetched" in first.output
    assert pd.read_csv(tmp_path / requests_trace.name).prompt_tokens.tolist() == [374, 396]
    again = CliRunner().invoke(app, command)  # the server is gone
    assert f"{requests_trace.name}: there" in again.output


@pytest.mark.parametrize(
    ("elsewhere", "missing_bytes", "message"),
    [("/not/here", 0, "HTTP Error 404"), ("", 10, "IncompleteRead")],
)
def test_a_download_that_fails_or_breaks_off_is_an_error_and_leaves_nothing(
    tmp_path: Path,
    requests_trace: TraceFile,
    monkeypatch: pytest.MonkeyPatch,
    elsewhere: str,
    missing_bytes: int,
    message: str,
) -> None:
    with served(elsewhere or path_of(requests_trace), REQUESTS, missing_bytes) as address:
        monkeypatch.setattr(trace_files, "_HOST", address)
        with pytest.raises(DataError, match=message):
            trace_files.traces_command(tmp_path, fetch=True)
    assert not list(tmp_path.iterdir())
