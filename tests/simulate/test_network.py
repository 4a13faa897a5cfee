"""Links in simulated time: what is sent in the background goes in parts, and probes take bandwidth."""

import math

import numpy as np
import pytest

from resplit.config import LinkShape
from resplit.phases import LinkState
from resplit.simulate.network import SimulatedNetwork

PART_BYTES, BANDWIDTH = 64 * 1024, 1e6  # bytes, bytes per second
PART_S = PART_BYTES / BANDWIDTH
LINK = LinkShape.model_validate({"latency": "0 ms", "bandwidth": "8 Mbit/s"})


def network(in_parts: bool = True) -> SimulatedNetwork:
    return SimulatedNetwork(lambda *_: LINK, np.random.default_rng(0), in_parts=in_parts)


def test_a_message_waits_for_the_rest_of_a_background_part_and_no_longer() -> None:
    links = network()
    links.send_in_background("a", "b", 10 * PART_BYTES, 0.0)
    assert links.due_s("a", "b", 1000, 0.01) == pytest.approx(PART_S + 0.001)
    assert links.due_s("b", "a", 1000, 0.01) == pytest.approx(0.011)  # the other direction is free


def test_background_parts_take_at_most_half_of_the_time() -> None:
    links, begins_s = network(), np.linspace(0.0, 0.6, 601)
    links.send_in_background("a", "b", 100 * PART_BYTES, 0.0)
    delayed = [links.due_s("a", "b", 0, float(at_s)) > at_s + 1e-9 for at_s in begins_s]
    assert np.mean(delayed) == pytest.approx(0.5, abs=0.06)


def test_a_background_transfer_has_arrived_once_its_last_part_has() -> None:
    links = network()
    transfer = links.send_in_background("a", "b", 3 * PART_BYTES, 0.0)
    due_s = 5 * PART_S  # three parts, with two pauses as long between them
    assert not links.has_arrived("a", "b", transfer, due_s - 1e-6)
    assert links.has_arrived("a", "b", transfer, due_s + 1e-6)


def test_transfers_follow_one_another_and_a_cancelled_one_gives_way() -> None:
    links = network()
    first, second = (links.send_in_background("a", "b", PART_BYTES, 0.0) for _ in range(2))
    assert not links.has_arrived("a", "b", second, 2 * PART_S)
    assert links.has_arrived("a", "b", second, 3 * PART_S + 1e-6)
    third, fourth = (links.send_in_background("a", "b", PART_BYTES, 10.0) for _ in range(2))
    third.cancel()
    assert links.has_arrived("a", "b", fourth, 10.0 + PART_S + 1e-6)
    assert links.has_arrived("a", "b", first, 1.0)


def test_what_is_sent_in_parts_arrives_when_it_was_said_to_if_no_message_comes_between() -> None:
    links = network()
    due_s = links.background_due_s("a", "b", 4 * PART_BYTES, 0.0)
    assert due_s == pytest.approx(7 * PART_S)
    assert network(in_parts=False).background_due_s("a", "b", 4 * PART_BYTES, 0.0) == pytest.approx(4 * PART_S)
    assert links.due_s("a", "b", 0, due_s) == pytest.approx(due_s)  # nothing is left to send


def test_without_parts_messages_do_not_wait_for_the_background() -> None:
    links = network(in_parts=False)
    links.background_due_s("a", "b", 10 * PART_BYTES, 0.0)
    assert links.due_s("a", "b", 1000, 0.01) == pytest.approx(0.011)


def test_messages_wait_for_a_probe_but_probes_do_not_pile_up() -> None:
    links = network()
    for _ in range(3):  # the later ones are left out while the first one is under way
        links.probe("a", "b", PART_BYTES, 0.0)
    assert links.due_s("a", "b", 0, 0.0) == pytest.approx(PART_S)


def test_nothing_probes_a_link_that_is_cut() -> None:
    links = network()
    links.change("a", "b", LinkState(0.0, BANDWIDTH, up=False), down_until_s=5.0)
    links.probe("a", "b", 100 * PART_BYTES, 1.0)
    assert links.due_s("a", "b", 0, 5.0) == pytest.approx(5.0)
    links.change("a", "b", LinkState(0.0, BANDWIDTH, up=False), down_until_s=math.inf)
    assert links.background_due_s("a", "b", PART_BYTES, 6.0) == math.inf
