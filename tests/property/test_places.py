"""The places of adapters in the bank: a fit is found, and bytes are given once."""

from itertools import combinations

import pytest
from hypothesis import given, settings, strategies as st

from inference_service.engine.lora.places import ALIGNMENT, Place, Places
from loramux_shared.faults import InternalFault, ResourcesExhausted
from tests.support.examples import examples

LINES = 12
"""Lines of the arena: few, so that every window can be looked at."""


def drawn(data: st.DataObject) -> tuple[Places, dict[int, tuple[int, int]], dict[int, int | None]]:
    """An arena after some occupants came and went, with the lines (first, end) of each, and their last use."""
    places, lines = Places(LINES * ALIGNMENT + 1), {}
    for owner in range(data.draw(st.integers(0, 10))):
        first = data.draw(st.integers(0, LINES - 1))
        end = first + data.draw(st.integers(1, 4))
        if end <= LINES and all(end <= other[0] or first >= other[1] for other in lines.values()):
            size = (end - first) * ALIGNMENT - data.draw(st.integers(0, ALIGNMENT - 1))
            places.take(owner, first * ALIGNMENT, size)
            lines[owner] = first, end
    for owner in data.draw(st.lists(st.sampled_from(sorted(lines)), unique=True)) if lines else []:
        places.give_back(owner)
        del lines[owner]
    used = {owner: data.draw(st.one_of(st.none(), st.integers(0, 5))) for owner in lines}
    return places, lines, used


def best_window(
    need: int, lines: dict[int, tuple[int, int]], used: dict[int, int | None]
) -> tuple[int, frozenset[int]] | None:
    """Look at every pair of lines: return the first line and the evicted owners, by the rule."""
    taken = {line: owner for owner, (first, end) in lines.items() for line in range(first, end)}
    holes, windows = [], []
    for first, end in combinations(range(LINES + 1), 2):
        owners = {taken[line] for line in range(first, end) if line in taken}
        whole = all(first <= lines[owner][0] and lines[owner][1] <= end for owner in owners)
        if end - first < need or not whole:
            continue
        borders = (first == 0 or first - 1 in taken) and (end == LINES or end in taken)
        if not owners and borders:
            holes.append((end - first, first))
        times = [used[owner] for owner in owners]
        if owners and None not in times:
            leaving = sum(lines[owner][1] - lines[owner][0] for owner in owners)
            windows.append(((max(times), leaving, first), frozenset(owners)))
    if holes:
        return min(holes)[1], frozenset()
    if not windows:
        return None
    (_, _, first), gone = min(windows, key=lambda window: window[0])
    return first, gone


@settings(max_examples=examples(40))
@given(data=st.data(), need=st.integers(1, LINES))
def test_a_fit_that_exists_is_found_and_it_is_the_best(data: st.DataObject, need: int) -> None:
    """The choice is an exhaustive search's: best hole, else longest unused, fewest bytes, lowest address."""
    places, lines, used = drawn(data)
    found = places.find(need * ALIGNMENT, used.__getitem__)
    expected = best_window(need, lines, used)
    assert (found and (found.offset // ALIGNMENT, frozenset(found.leaving))) == expected


def test_what_can_never_fit_is_refused_by_name() -> None:
    """The refusal names the size of the adapter and of the bank, and evicts nothing."""
    with pytest.raises(ResourcesExhausted, match="192 bytes does not fit the bank of 128 bytes"):
        Places(128).find(129, lambda _: None)


def test_bytes_are_given_once_and_taken_back_once() -> None:
    """A caller that loses count is reported, and nothing changes."""
    places = Places(256)
    places.take(7, 64, 65)
    for owner, offset, size in ((7, 192, 64), (8, 128, 64), (8, 0, 65), (8, 192, 128), (8, 32, 8)):
        with pytest.raises(InternalFault, match="cannot have the bytes"):
            places.take(owner, offset, size)
    with pytest.raises(InternalFault, match="no place"):
        places.give_back(8)
    assert places.num_free == 128
    places.take(8, 192, 64)
    places.give_back(7)
    assert places.find(192, lambda _: None) == Place(0)
