"""The launches of a step on a GPU, counted without one, against the golden table."""

from tests.golden.kernels.counts import TABLE, text


def test_the_counts_are_those_that_are_kept() -> None:
    """Launches, programs, rows and kinds of steps change only where a change is meant to (make golden)."""
    assert text().splitlines() == TABLE.read_text().splitlines()
