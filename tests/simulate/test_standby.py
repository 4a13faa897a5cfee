"""Stand-by blocks in simulated time: loaded one after another into memory that is free, and the first to go."""

from __future__ import annotations

import pytest

from resplit.simulate.agenda import Agenda
from resplit.simulate.standby import SimulatedStandby

NODE = "node"
LOAD_S, REST_S = 1.0, 3.0


class Bench:
    """A node with room for three blocks of one byte."""

    def __init__(self) -> None:
        self.agenda = Agenda()
        self.held: set[int] = set()
        self.free_bytes = 3.0
        self.blocks = SimulatedStandby(
            [NODE],
            [1.0] * 8,
            lambda node, block: LOAD_S,
            lambda node, block: block in self.held,
            lambda node: self.free_bytes - len(self.held),
            self.agenda,
        )

    def after(self, until_s: float) -> tuple[int, ...]:
        self.agenda.run(until_s)
        return self.blocks.of(NODE)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_blocks_are_loaded_one_after_another_with_a_rest_the_most_wanted_first(bench: Bench) -> None:
    bench.blocks.keep({NODE: (5, 2, 4, 1)})
    assert bench.after(0.5) == ()
    assert bench.after(LOAD_S) == (5,)
    assert bench.after(LOAD_S + REST_S) == (5,)
    assert bench.after(2 * LOAD_S + REST_S) == (5, 2)
    assert bench.after(1000.0) == (5, 2, 4)  # there is no room for more


def test_a_block_that_an_epoch_has_is_not_loaded_again(bench: Bench) -> None:
    bench.held = {5}
    bench.blocks.keep({NODE: (5, 2)})
    assert bench.after(1000.0) == (2,)


def test_blocks_that_are_not_wanted_any_more_go_and_one_that_is_being_loaded_does_not_stay(bench: Bench) -> None:
    bench.blocks.keep({NODE: (5, 2)})
    bench.after(LOAD_S + REST_S + 0.5)
    bench.blocks.keep({NODE: (3,)})
    assert bench.blocks.of(NODE) == ()
    assert bench.after(1000.0) == (3,)


def test_caches_take_the_room_of_the_least_wanted_block(bench: Bench) -> None:
    bench.blocks.keep({NODE: (5, 2, 4)})
    assert bench.after(1000.0) == (5, 2, 4)
    bench.free_bytes = 1.5
    assert bench.blocks.of(NODE) == (5,)


def test_an_epoch_takes_a_block_once_and_gives_it_back_if_it_is_wanted(bench: Bench) -> None:
    bench.blocks.keep({NODE: (5, 2)})
    bench.after(1000.0)
    assert bench.blocks.claim(NODE, 5)
    assert not bench.blocks.claim(NODE, 5)
    bench.blocks.retire(NODE, 5)
    bench.blocks.retire(NODE, 7)
    assert bench.blocks.of(NODE) == (2, 5)


def test_a_node_that_went_down_has_nothing_and_is_told_anew(bench: Bench) -> None:
    bench.blocks.keep({NODE: (5, 2)})
    bench.after(1000.0)
    bench.blocks.forget(NODE)
    assert bench.after(2000.0) == ()
    bench.blocks.keep({NODE: (2,)})
    assert bench.after(3000.0) == (2,)
