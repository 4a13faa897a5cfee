"""A series of measurements ends when no link of it is doubted, or after some. A link is in one series at a time."""

from resplit.control.repeated_measurements import MEASURED_AGAIN_S, MOST_MEASUREMENTS, RepeatedMeasurements

AB, BA, AC = ("a", "b"), ("b", "a"), ("a", "c")


def test_only_the_links_that_stay_in_doubt_are_measured_again() -> None:
    series = RepeatedMeasurements().begin([AB, BA])
    assert series is not None
    assert (series.left, series.is_over) == ([AB, BA], False)
    series.measured([AC, AB])
    assert (series.left, series.is_over) == ([AB], False)
    series.measured([AC, BA])
    assert (series.left, series.is_over) == ([], True)


def test_a_series_is_over_after_some_measurements() -> None:
    series = RepeatedMeasurements().begin([AB])
    assert series is not None
    for _ in range(MOST_MEASUREMENTS):
        assert not series.is_over
        series.measured([AB])
    assert series.is_over
    assert series.left == [AB]


def test_a_link_is_in_one_series_at_a_time() -> None:
    measurements = RepeatedMeasurements()
    assert measurements.begin([]) is None
    assert not measurements.are_under_way
    first, second = measurements.begin([AB, BA]), measurements.begin([AB, AC])
    assert first is not None
    assert second is not None
    assert (second.links, second.left) == ((AC,), [AC])
    assert measurements.begin([BA, AC]) is None
    first.measured([])
    measurements.end(first)
    assert measurements.are_under_way
    again = measurements.begin([BA, AC])
    assert again is not None
    assert again.links == (BA,)
    measurements.end(second)
    measurements.end(again)
    assert not measurements.are_under_way


def test_a_node_is_asked_again_after_a_moment_only() -> None:
    measurements = RepeatedMeasurements()
    assert measurements.ask("a", 0.0)
    assert not measurements.ask("a", MEASURED_AGAIN_S / 2)
    assert measurements.ask("b", MEASURED_AGAIN_S / 2)
    assert measurements.ask("a", MEASURED_AGAIN_S)
    assert not measurements.ask("a", 1.5 * MEASURED_AGAIN_S)
