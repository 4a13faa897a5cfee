"""A node whose vital task fails ends with the error, so that a supervisor can start it again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from resplit.cluster.local import free_ports
from resplit.model.source import StoredModel
from resplit.node.probe import Probe
from resplit.node.server import serve_node
from resplit.security.authority import keys_command
from resplit.wire.addresses import Address
from tests.support.two_nodes import two_node_config


async def test_a_node_whose_probe_fails_ends_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(probe: Probe) -> None:
        raise OSError("a sensor is gone")

    monkeypatch.setattr(Probe, "run", fail)
    with pytest.raises(OSError, match="a sensor is gone"):
        await run_node(tmp_path)


async def test_a_node_whose_engine_thread_ends_with_a_defect_ends_with_its_error(
    stored_model: StoredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def damage(probe: Probe) -> None:
        executor = await probe._hosting._start_executor(stored_model.spec)
        with executor._changed:
            executor._waiting.append(None)  # type: ignore[arg-type]  # no pass, so that the thread fails
            executor._changed.notify()
        await asyncio.Event().wait()

    monkeypatch.setattr(Probe, "run", damage)
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'work'"):
        await run_node(tmp_path)


async def run_node(folder: Path) -> None:
    """Run a node for 20 s at most."""
    config, address = two_node_config(), Address("127.0.0.1", free_ports(1)[0])
    keys_command(folder, config.node_names)
    await asyncio.wait_for(serve_node("plain", config, folder / "plain", str(folder), address, asyncio.Event()), 20)
