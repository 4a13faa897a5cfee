"""Invalid HTTP requests to gateway and controller, while valid streams run beside them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import requests
import schemathesis
from hypothesis import strategies as st
from schemathesis.core.result import Ok

from benchmarks.chaos.findings import Finding, stream_findings
from benchmarks.chaos.fuzz_wire import LIGHT
from benchmarks.chaos.resources import sampling
from resplit.cluster.client import ControlClient
from tests.support.cluster import MODEL, load_unsplit, make_model, started
from tests.support.fuzzing import object_text, odd_json, odd_object, odd_scalars, send_for
from tests.support.processes import poll_until
from tests.support.streams import PROMPTS, expected_tokens, streaming

LASTS_S = 600.0
NEW_TOKENS = 96
_ANSWER_WITHIN_S = 20.0
_NOT_THESE = ("/control/profile",)  # keeps all nodes busy for seconds, and only operators may call it
_SERVED = (("model", f'"{MODEL}"'), ("max_tokens", "2"), ("temperature", "0.5"))
_PROMPTS = {
    "/v1/completions": ("prompt", '"a"'),
    "/v1/chat/completions": ("messages", '[{"role":"user","content":"a"}]'),
}
_PARAMETERS = st.sampled_from(
    ["model", "prompt", "messages", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "n", "ignore_eos"]
)
_HEADERS = st.dictionaries(
    st.sampled_from(["Authorization", "X-Resplit-Class", "X-Resplit-Deadline-S", "Content-Type", "Content-Length"]),
    st.sampled_from(["", "chat", "1e-9", "nan", "-1", "1e400", "Bearer", "Bearer x", "application/json", "99999999"]),
    max_size=2,
)
_RAW = st.binary(max_size=300) | st.sampled_from(
    [
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n{",
        b"GET /v1/models HTTP/1.1\r\n" + b"X-A: " + b"a" * 100_000,
        b"GET /v1/models HTTP/1.1\r\n" + b"X: y\r\n" * 5000,
        b"GET /v1/models/../../control/status HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]
)


class _Answer(Protocol):
    """What both HTTP clients return."""

    status_code: int


@dataclass
class CountingClient:
    """Calls one gateway and counts the outcomes."""

    url: str
    token: str
    outcomes: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)

    def described(self, case: schemathesis.Case[Any]) -> None:
        """A request generated from the service's OpenAPI schema, valid or not."""
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = MODEL  # a random name would always give 404
        case.headers.pop("x-resplit-class", None)  # a random class would always give 400
        late = "x-resplit-deadline-s" in case.headers
        self._count(f"{case.method} {case.path}", lambda: case.call(timeout=_ANSWER_WITHIN_S), late)

    def odd(self, path: str, body: bytes, headers: dict[str, str]) -> None:
        """A request with any body and any headers."""
        late = "X-Resplit-Deadline-S" in headers
        wanted = {"Content-Type": "application/json"} | headers
        wanted.pop("Content-Length", None)
        call = lambda: requests.post(self.url + path, body, headers=wanted, timeout=_ANSWER_WITHIN_S)  # noqa: E731
        self._count(f"odd {path}", call, late)

    def raw(self, content: bytes) -> None:
        """Any bytes on the port."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1) as connection:
            connection.sendall(content)
            connection.settimeout(0.05)
            answer = connection.recv(64)
            if answer.startswith(b"HTTP/1.1 5"):
                self.broken[f"raw: {answer[:40]!r}"] += 1
        self.outcomes["raw"] += 1

    def _count(self, what: str, call: Callable[[], _Answer], late: bool) -> None:
        try:
            status = call().status_code
        except requests.Timeout:
            self.broken[f"{what}: no answer within {_ANSWER_WITHIN_S:g} s"] += 1
            return
        except (requests.RequestException, ValueError, UnicodeError) as error:  # the client library refuses to send it
            self.outcomes[f"{what}: {type(error).__name__}"] += 1
            return
        self.outcomes[f"{what}: {status}"] += 1
        if status >= 500 and not (status == 504 and late):
            self.broken[f"{what}: {status}"] += 1


def calls(caller: CountingClient) -> st.SearchStrategy[Callable[[], None]]:
    """A strategy for calls that are ready to be made."""
    described = []
    for root, headers in ((caller.url, {}), (f"{caller.url}/control", {"Authorization": f"Bearer {caller.token}"})):
        schema = schemathesis.openapi.from_url(f"{root}/openapi.json", headers=headers)
        schema.config.update(headers=headers)
        for operation in schema.get_all_operations():
            assert isinstance(operation, Ok), operation
            one = operation.ok()
            if (root.removeprefix(caller.url) + one.path) not in _NOT_THESE:
                described += [one.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode]
    bodies = odd_object(_PARAMETERS, odd_json()).map(str.encode) | odd_json().map(str.encode) | st.binary(max_size=80)
    paths = st.sampled_from([*_PROMPTS, "/v1/models/x", "/control/proposals", "/nothing"])
    kinds = (
        st.one_of(described).map(lambda case: lambda: caller.described(case)),
        st.builds(lambda path, body, more: lambda: caller.odd(path, body, more), paths, bodies, _HEADERS),
        _almost_valid().map(lambda call: lambda: caller.odd(*call, {})),
        _RAW.map(lambda content: lambda: caller.raw(content)),
    )
    # Equal shares of each kind. In a plain `one_of`, the many operations would crowd out the others.
    return st.sampled_from(kinds).flatmap(lambda kind: kind)


def _almost_valid() -> st.SearchStrategy[tuple[str, bytes]]:
    """Path and body of a request that would be served, with one parameter that has an odd value."""
    odd = st.tuples(st.sampled_from(["temperature", "top_p", "seed", "max_tokens", "stop"]), odd_scalars())
    return st.builds(
        lambda path, pair: (path, object_text([*_SERVED, _PROMPTS[path], pair]).encode()),
        st.sampled_from(list(_PROMPTS)),
        odd,
    )


async def run(scale: float, folder: Path) -> list[Finding]:
    """Send such requests for ten minutes, beside four streams."""
    model = make_model(folder)
    prompts = PROMPTS[:4]
    expected = expected_tokens(load_unsplit(model), NEW_TOKENS, prompts)
    with started(folder, model, LIGHT) as cluster, ControlClient(cluster.url, cluster.token) as client:
        caller = CountingClient(cluster.url, cluster.token)
        async with sampling(cluster) as usage, streaming(cluster, expected, prompts) as streams:
            lasts_s = max(5.0, LASTS_S * scale)
            sent = await asyncio.to_thread(lambda: send_for(lasts_s, calls(caller), lambda call: call()))
        await poll_until(lambda: client.status().sessions == 0, 20)
        dead = cluster.dead()
    (folder / "outcomes.txt").write_text("\n".join(f"{n:7} {what}" for what, n in caller.outcomes.most_common()))
    broken = "; ".join(f"{n} x {what}" for what, n in caller.broken.most_common(4)) or "none"
    return [
        *stream_findings("fuzz_http", streams),
        Finding("fuzz_http", "requests sent", f"{sent}, {len(caller.outcomes)} outcomes", "> 0", met=sent > 0),
        Finding("fuzz_http", "processes that ended", ", ".join(dead) or "none", "none", met=not dead),
        Finding("fuzz_http", "hangs and server errors", broken, "none", met=not caller.broken),
        *usage.findings("fuzz_http"),
    ]
