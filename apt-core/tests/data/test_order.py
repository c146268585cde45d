"""An order that is computed is a permutation, whatever its length."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from apt.data.order import Order


@given(st.integers(1, 5000), st.integers(0, 2**40), st.integers(0, 1000))
def test_every_item_has_one_place(length: int, seed: int, number: int) -> None:
    items = Order(length, (seed, number))[:]
    assert np.array_equal(np.sort(items), np.arange(length))


@given(st.integers(1, 3000), st.integers(0, 9), st.data())
def test_a_part_is_the_same_as_in_the_whole(length: int, seed: int, data: st.DataObject) -> None:
    start, stop = sorted(data.draw(st.integers(0, length + 10)) for _ in range(2))
    order = Order(length, (seed,))
    assert np.array_equal(order[start:stop], order[:][start:stop])


def test_a_length_beyond_any_memory_has_its_items_inside_and_no_two_alike() -> None:
    order = Order(3 * 10**12 + 7, (1, 2))
    items = np.concatenate([order[at : at + 10_000] for at in (0, 10**9, 3 * 10**12 - 9_993)])
    assert len(set(items.tolist())) == 30_000
    assert 0 <= items.min() < 10**9
    assert 3 * 10**12 - 10**9 < items.max() < 3 * 10**12 + 7


def test_an_order_is_shuffled_as_well_as_one_that_is_drawn() -> None:
    for length in (1000, 65_537):
        items = Order(length, (0, 0))[:]
        neighbours = np.abs(np.diff(items)).mean() / length
        assert abs(neighbours - 1 / 3) < 0.02
        assert abs(np.corrcoef(items, np.arange(length))[0, 1]) < 0.08
        assert not np.array_equal(items, Order(length, (0, 1))[:])
        # In a random permutation one item stands at its own place on the average.
        assert (items == np.arange(length)).sum() < 8
