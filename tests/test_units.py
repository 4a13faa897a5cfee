"""Quantities with units in configuration files."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from resplit.units import Bytes, BytesPerSecond, Seconds, shown_bytes, shown_exactly

BYTES, SECONDS, RATE = TypeAdapter(Bytes), TypeAdapter(Seconds), TypeAdapter(BytesPerSecond)


@pytest.mark.parametrize(
    ("kind", "written", "expected"),
    [
        (BYTES, "420 MiB", 420 * 2**20),
        (BYTES, "1.5GB", 1.5e9),
        (BYTES, "0 B", 0.0),
        (BYTES, " 2 kB ", 2000.0),
        (SECONDS, "3 ms", 0.003),
        (SECONDS, ".5 s", 0.5),
        (SECONDS, "1e3 us", 0.001),
        (SECONDS, "2 min", 120.0),
        (RATE, "200 Mbit/s", 25e6),
        (RATE, "8 bit/s", 1.0),
    ],
)
def test_a_quantity_is_read_in_its_unit(kind: TypeAdapter[float], written: str, expected: float) -> None:
    assert kind.validate_python(written) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kind", "written"),
    [
        (BYTES, "420"),
        (BYTES, 420),
        (BYTES, "420 ms"),
        (BYTES, "420 mib"),
        (BYTES, "-1 MiB"),
        (BYTES, "MiB"),
        (BYTES, "1 2 MiB"),
        (SECONDS, "3 sec"),
        (SECONDS, "3 ms/s"),
        (SECONDS, None),
        (RATE, "200 MB/s"),
        (RATE, "200 Mbit"),
    ],
)
def test_a_missing_or_wrong_unit_is_refused_and_the_allowed_ones_are_named(
    kind: TypeAdapter[float], written: object
) -> None:
    with pytest.raises(ValidationError, match=r"needs a number and one of the units .* such as '5 "):
        kind.validate_python(written)


@given(st.floats(0, 1e12))
def test_every_number_is_parsed_exactly(number: float) -> None:
    assert SECONDS.validate_python(f"{number!r} s") == number
    assert BYTES.validate_python(f"{number!r} KiB") == number * 1024


@pytest.mark.parametrize(
    ("count", "shown", "exactly"),
    [
        (0, "0 bytes", "0 bytes"),
        (1023, "1023 bytes", "1023 bytes"),
        (2048, "2.0 KiB", "2.0 KiB (2048 bytes)"),
        (157300000, "150.0 MiB", "150.0 MiB (157300000 bytes)"),
        (2**30 * 1.214, "1.21 GiB", "1.21 GiB (1303522574 bytes)"),
        (2**42, "4096.00 GiB", "4096.00 GiB (4398046511104 bytes)"),
    ],
)
def test_bytes_are_shown_in_the_largest_unit_that_fits(count: float, shown: str, exactly: str) -> None:
    assert shown_bytes(count) == shown
    assert shown_exactly(count) == exactly
