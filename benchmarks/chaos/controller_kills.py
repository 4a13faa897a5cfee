"""The process of gateway and controller is killed before and after every write to its epoch log, and restarted.

After every restart all nodes must serve the live epoch of the log, and answers must be correct.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.chaos.findings import Finding, spread
from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster, start_process
from resplit.epochs import Proposal
from resplit.errors import ResplitError
from resplit.security.identity import CONTROLLER
from tests.support.cluster import load_unsplit, make_model, started
from tests.support.processes import command_of, poll_until, ready, settled
from tests.support.streams import expected_tokens, request_completion

NEW_TOKENS = 24
# A restart writes proposed, prepared, committed and released of the epoch that it resumes. A change writes the
# same four steps. The ninth write never happens.
WRITES = 9
A, B, C, D = "alpha", "beta", "gamma", "delta"
PLACEMENTS = ([A, A, B, C, C, D, D, A], [B, B, C, D, A, A, C, B])


async def run(scale: float, folder: Path) -> list[Finding]:
    """18 kills: before and after each of 9 writes. A short run takes some of them."""
    model = make_model(folder)
    expected = expected_tokens(load_unsplit(model), NEW_TOKENS)[0]
    kills = [(when, number) for number in range(1, WRITES + 1) for when in ("before", "after")]
    kills = kills[:: max(1, round(1 / scale))]
    killed, wrong, epochs, back_s = 0, [], [], []
    with started(folder, model) as cluster, ControlClient(cluster.url, cluster.token) as client:
        for index, (when, number) in enumerate(kills):
            killed += await change_until_killed(cluster, client, when, number, PLACEMENTS[index % 2])
            back_s.append(await restart(cluster, client))
            epochs.append(client.model().epoch)
            try:
                await poll_until(lambda: settled(client) and one_epoch(client), 20)
            except TimeoutError:
                wrong.append(f"{when} write {number}: {client.status().nodes}")
            if request_completion(cluster, NEW_TOKENS).json()["choices"][0]["token_ids"] != expected:
                wrong.append(f"{when} write {number}: other tokens")
    rising = all(later > earlier for earlier, later in itertools.pairwise(epochs))
    return [
        Finding(
            "controller_kills",
            "restarts, each after a kill at a log write",
            f"{len(kills)}, of which {killed} were killed",
            met=killed > 0,
        ),
        Finding(
            "controller_kills",
            "restarts that ended in a wrong state",
            f"{len(wrong)} {wrong[:1] or ''}",
            "0",
            met=not wrong,
        ),
        Finding("controller_kills", "epoch numbers only grow", "yes" if rising else str(epochs), "yes", met=rising),
        Finding(
            "controller_kills", "time from the start of the process until requests are served", spread(back_s, "s")
        ),
    ]


async def change_until_killed(
    cluster: Cluster, client: ControlClient, when: str, number: int, placement: Sequence[str]
) -> bool:
    """Start a controller that kills itself at a write, then change the placement. Returns whether it was killed."""
    process = cluster.processes[CONTROLLER]
    process.kill()
    process.wait()
    crashing = [sys.executable, "-m", "benchmarks.chaos.crash_at_step", when, str(number)]
    start_process(cluster, CONTROLLER, [*crashing, *command_of(process)[3:]])
    controller = cluster.processes[CONTROLLER]
    await poll_until(lambda: controller.poll() is not None or ready(client), 60)
    with contextlib.suppress(ResplitError):
        live = client.model()
        client.propose(Proposal(tuple(placement), "re-split", live.epoch))
    with contextlib.suppress(TimeoutError):
        await poll_until(lambda: controller.poll() is not None, 2)
    return controller.poll() is not None


async def restart(cluster: Cluster, client: ControlClient) -> float:
    """Start the usual controller. Returns the seconds until it serves."""
    process = cluster.processes[CONTROLLER]
    if process.poll() is None:
        process.kill()
    process.wait()
    start_process(cluster, CONTROLLER)
    return await poll_until(lambda: ready(client), 60)


def one_epoch(client: ControlClient) -> bool:
    """Whether every node serves the live epoch only."""
    status = client.status()
    return all(node.epochs == (status.epoch,) for node in status.nodes)
