from __future__ import annotations

import math

import pytest
import torch
from apt_voter.functional import elect, entropy, seed_of, vote
from hypothesis import given
from hypothesis import strategies as st

LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30).map(torch.tensor)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(LOGITS)
def test_entropy_lies_between_0_and_that_of_the_uniform_distribution(logits: torch.Tensor) -> None:
    assert -1e-5 <= entropy(logits[None]).item() <= math.log(len(logits)) + 1e-5


def test_entropy_of_equal_logits_is_the_logarithm_of_their_number_and_what_cannot_be_drawn_does_not_count() -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0, -torch.inf], [0.0, -torch.inf, -torch.inf, -torch.inf]])
    torch.testing.assert_close(entropy(logits), torch.tensor([math.log(3), 0.0]))


@given(LOGITS, st.integers(0, 99))
def test_one_draw_that_votes_is_a_plain_draw(logits: torch.Tensor, seed: int) -> None:
    drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator(seed))
    assert vote(logits, 1, generator(seed)) == drawn


def test_many_draws_elect_the_likeliest_token() -> None:
    logits = torch.tensor([0.0, 0.7, 0.3])
    assert all(vote(logits, 3000, generator(seed)) == 1 for seed in range(20))


def test_the_likelier_token_wins_a_tie() -> None:
    logits = torch.tensor([0.0, 0.1])
    winners = []
    for seed in range(200):
        draws = torch.multinomial(logits.softmax(-1), 2, replacement=True, generator=generator(seed)).tolist()
        winner = vote(logits, 2, generator(seed)).item()
        assert winner == (draws[0] if draws[0] == draws[1] else 1)
        winners.append(winner)
    assert set(winners) == {0, 1}


@given(LOGITS, st.integers(1, 9), st.integers(0, 99))
def test_the_elected_token_is_the_only_one_that_can_be_drawn(logits: torch.Tensor, k: int, seed: int) -> None:
    token = vote(logits, k, generator(seed))
    for temperature in (0.1, 1.0, 7.0):
        share = (elect(logits, token) / temperature).softmax(-1)
        assert share[token] == 1.0
        assert share.sum() == 1.0


def test_a_text_has_a_seed_of_its_own() -> None:
    seeds = [seed_of([1, 2], 0), seed_of([1, 3], 0), seed_of([12], 0), seed_of([1, 2], 1)]
    assert len(set(seeds)) == 4
    assert seed_of([1, 2], 0) == seeds[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_keep_their_type(dtype: torch.dtype) -> None:
    assert elect(torch.zeros(3, dtype=dtype), torch.tensor(1)).dtype is dtype
