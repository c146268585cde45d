"""Batches are counted, not drawn: which windows a step sees follows from the seed and its number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apt.core.config import APTConfig
from apt.data import batches as module
from apt.data.batches import Batches, num_windows, windows
from apt.data.pairs import PairSplit
from apt.data.tokens import TokenSplit
from apt.training.ranks import Ranks


def split(count: int) -> TokenSplit:
    return TokenSplit(np.arange(count, dtype=np.uint16), count, 1)


@given(st.integers(9, 400), st.integers(1, 8), st.integers(1, 5), st.integers(0, 50), st.integers(0, 3))
def test_a_batch_follows_from_its_number_alone(count: int, seq: int, batch: int, index: int, seed: int) -> None:
    one, other = (Batches(split(count), seq, batch, seed) for _ in range(2))
    for before in range(index % 7):
        one.get(before)
    seen, again = one.get(index), other.get(index)
    assert torch.equal(seen.tokens, again.tokens)
    assert seen.tokens.shape == (batch, seq)
    assert torch.equal(seen.targets, seen.tokens + 1)


@given(st.integers(20, 400), st.integers(1, 8), st.integers(0, 3))
def test_a_pass_sees_every_window_once(count: int, seq: int, seed: int) -> None:
    batches = Batches(split(count), seq, 1, seed)
    starts = [int(batches.get(index).tokens[0, 0]) for index in range(batches.batches_per_pass)]
    assert len(starts) == len(set(starts)) == (count - 1) // seq
    assert all((start - starts[0]) % seq == 0 for start in starts)


def test_the_order_does_not_depend_on_how_much_of_it_is_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def starts() -> list[list[int]]:
        batches = Batches(split(1000), 7, 4, 3)
        return [batches.get(index).tokens[:, 0].tolist() for index in (0, 30, 31, 34, 35, 36, 2)]

    before = starts()
    monkeypatch.setattr(module, "BLOCK", 10)
    assert starts() == before


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 20))
def test_ranks_share_a_batch_without_overlap(size: int, rows: int, index: int) -> None:
    whole = Batches(split(900), 5, size * rows, 1).get(index).tokens
    shares = [Ranks(rank, size).share(whole) for rank in range(size)]
    assert torch.equal(torch.cat(shares), whole)
    assert len({int(start) for share in shares for start in share[:, 0]}) == size * rows


def test_a_batch_that_is_larger_than_the_text_repeats_windows() -> None:
    batches = Batches(split(17), 4, 10, 0)
    assert batches.batches_per_pass == 1
    assert len(set(batches.get(0).tokens[:, 0].tolist())) == 4


def test_passes_and_seeds_differ_in_their_order() -> None:
    orders = [
        [int(batches.get(first + index).tokens[0, 0]) for index in range(20)]
        for batches, first in (
            (Batches(split(101), 5, 1, 0), 0),
            (Batches(split(101), 5, 1, 0), 20),
            (Batches(split(101), 5, 1, 1), 0),
        )
    ]
    assert len({tuple(order) for order in orders}) == 3


@given(st.integers(2, 300), st.integers(1, 9), st.integers(1, 5))
def test_windows_cover_a_split_exactly_once(count: int, seq: int, batch: int) -> None:
    targets: list[int] = []
    number = 0
    for each in windows(split(count), seq, batch):
        kept = torch.ones_like(each.targets, dtype=torch.bool) if each.mask is None else each.mask
        targets += each.targets[kept].tolist()
        number += len(each.targets)
    assert targets == list(range(1, count))
    assert number == num_windows(split(count), seq)


def test_a_few_batches_are_spread_over_the_whole_split() -> None:
    starts = [int(each) for batch in windows(split(1001), 10, 4, max_batches=3) for each in batch.tokens[:, 0]]
    assert len(starts) == 12
    assert (starts[0], starts[-1]) == (0, 990)
    assert starts == sorted(set(starts))


def test_bits_a_byte_of_pairs_are_those_of_their_targets() -> None:
    # Three pairs of a source of nine bytes and a target of one; each text stands after the id that starts one.
    texts = [1, *range(10, 19), 1, 20] * 3
    pairs = PairSplit(TokenSplit(np.array(texts, np.uint16), 30, 6), APTConfig())
    # A target's byte and the end's id count.
    assert pairs.bytes_per_token == 3 / 6
