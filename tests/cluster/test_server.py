"""The gateway asks for an API key if a class has one, or if it listens on an address other than loopback."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from resplit.cluster.server import _app
from resplit.config import ClusterConfig
from resplit.model.source import StoredModel
from resplit.wire.addresses import Address
from tests.support.in_process import InProcessCluster


@pytest.mark.parametrize(
    ("host", "api_keys", "open_to_all"),
    [
        ("127.0.0.1", [], True),
        ("::1", [], True),
        ("localhost", [], True),
        ("0.0.0.0", [], False),
        ("192.168.1.7", [], False),
        ("127.0.0.1", ["open-sesame"], False),
        ("0.0.0.0", ["open-sesame"], False),
    ],
)
async def test_api_keys_are_off_by_default_on_loopback_only(
    stored_model: StoredModel, tmp_path: Path, host: str, api_keys: list[str], open_to_all: bool
) -> None:
    config = ClusterConfig.model_validate(
        {
            "name": "test",
            "source": "alone",
            "trusted": ["alone"],
            "nodes": [{"name": "alone", "memory": "8 MiB"}],
            "classes": [{"name": "chat", "rate_rps": 1, "prompt_tokens": 8, "new_tokens": 8, "api_keys": api_keys}],
            "kv_tokens": 64,
        }
    )
    app = _app(config, stored_model, InProcessCluster(config, stored_model, tmp_path).sessions, Address(host, 8080))

    async def status(**headers: str) -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            return (await client.get("/v1/models", headers=headers)).status_code

    assert await status() == (200 if open_to_all else 401)
    assert await status(Authorization="Bearer guessed") == (200 if open_to_all else 401)
    for key in api_keys:
        assert await status(Authorization=f"Bearer {key}") == 200
