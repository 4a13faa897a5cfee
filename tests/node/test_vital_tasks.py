"""A node whose vital task fails ends with the error, so that a supervisor can start it again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from resplit.cluster.local import free_ports
from resplit.node.probe import Probe
from resplit.node.server import serve_node
from resplit.security.authority import keys_command
from resplit.wire.addresses import Address
from tests.support.two_nodes import two_node_config


async def test_a_node_whose_probe_fails_ends_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(probe: Probe) -> None:
        raise OSError("a sensor is gone")

    monkeypatch.setattr(Probe, "run", fail)
    config, address = two_node_config(), Address("127.0.0.1", free_ports(1)[0])
    keys_command(tmp_path, config.node_names)

    with pytest.raises(OSError, match="a sensor is gone"):
        await asyncio.wait_for(
            serve_node("plain", config, tmp_path / "plain", str(tmp_path), address, asyncio.Event()), 20
        )
