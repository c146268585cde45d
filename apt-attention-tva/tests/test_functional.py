from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apt_attention_tva.costs import BLOCK, composing_pays, visited_scores
from apt_attention_tva.functional import (
    broken_line,
    compose_down,
    compose_up,
    lost_energy,
    orthonormal,
    row_entropy,
    sums_by_piece,
)

SEEDS = st.integers(0, 2**31 - 1)


def draw(seed: int, *sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 9))
def test_drawn_projectors_have_orthonormal_rows(count: int, rank: int, more: int) -> None:
    drawn = orthonormal(count, rank, rank + more)
    torch.testing.assert_close(drawn @ drawn.mT, torch.eye(rank).expand(count, -1, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pairs", [1, 3])
def test_composing_before_and_projecting_after_agree(pairs: int) -> None:
    down, up = draw(0, pairs, 2, 5), draw(1, pairs, 5, 2)
    inward, outward, x = draw(2, 15, 7), draw(3, 7, 15), draw(4, 7)
    heads = (inward @ x).unflatten(0, (3, 5, 1))
    torch.testing.assert_close(compose_down(inward, down) @ x, (down @ heads).flatten())
    narrow = draw(5, 3, 2, 1)
    torch.testing.assert_close(compose_up(outward, up) @ narrow.flatten(), outward @ (up @ narrow).flatten())


@given(st.integers(1, 2000), st.integers(1, 6), st.integers(2, 64), st.integers(1, 64))
def test_composing_is_chosen_where_it_multiplies_less(tokens: int, heads: int, d_head: int, rank: int) -> None:
    d_model, rank = heads * d_head, min(rank, d_head)
    composed = rank * d_head * d_model + tokens * rank * d_model
    after = tokens * (d_head * d_model + rank * d_head)
    assert composing_pays(tokens, d_model, d_head, rank) == (composed < after)


@given(st.integers(1, 1000))
def test_visited_scores_are_the_causal_ones_up_to_the_ends_of_blocks(seq: int) -> None:
    assert seq * (seq + 1) // 2 <= visited_scores(seq) <= seq * (seq + BLOCK) // 2 + seq * BLOCK // 2


def test_lost_energy_is_none_inside_the_subspace_and_all_outside() -> None:
    down = torch.eye(6, dtype=torch.float64)[:2]
    h = draw(0, 4, 6)
    inside, outside = h.clone(), h.clone()
    inside[:, 2:], outside[:, :2] = 0, 0
    torch.testing.assert_close(lost_energy(inside, down), torch.zeros(4))
    torch.testing.assert_close(lost_energy(outside, down), torch.ones(4))
    assert lost_energy(torch.zeros(1, 6), down).item() == 0


@given(SEEDS)
def test_lost_energy_of_a_random_subspace_is_its_missing_share_of_dimensions(seed: int) -> None:
    torch.manual_seed(seed)
    lost = lost_energy(torch.randn(500, 64), orthonormal(1, 16, 64)[0])
    assert bool((lost >= 0).all() and (lost <= 1 + 1e-5).all())
    assert lost.mean().item() == pytest.approx(0.75, abs=0.03)


@given(SEEDS, st.integers(1, 20))
def test_the_broken_line_is_the_two_layer_map_and_has_its_gradients(seed: int, hidden: int) -> None:
    values = [
        draw(seed + i, *sizes).requires_grad_() for i, sizes in enumerate([(5, 6), (hidden,), (hidden,), (hidden,)])
    ]
    x, slope, offset, height = values
    plain = (torch.relu(x.unsqueeze(-1) * slope + offset) * height).sum(-1)
    weights = draw(seed + 9, 5, 6)
    expected = torch.autograd.grad((plain * weights).sum(), values)
    line = broken_line(x, slope, offset, height)
    torch.testing.assert_close(line, plain)
    torch.testing.assert_close(torch.autograd.grad((line * weights).sum(), values), expected)


def test_pieces_without_slope_are_on_everywhere_or_nowhere() -> None:
    x = draw(0, 9)
    slope, height = torch.tensor([0.0, -0.0, 0.0, 1.0]).double(), torch.tensor([1.0, 2.0, 4.0, 8.0]).double()
    offset = torch.tensor([3.0, 5.0, -1.0, 0.5]).double()
    expected = 3 + 10 + 8 * torch.relu(x + 0.5)
    torch.testing.assert_close(broken_line(x, slope, offset, height), expected)


@given(SEEDS, st.integers(1, 12))
def test_row_entropy_is_that_of_the_visible_keys_over_its_largest_value(seed: int, keys: int) -> None:
    scores, unseen = draw(seed, 3, 12), torch.zeros(3, 12, dtype=torch.bool)
    unseen[:, keys:] = True
    p = scores[:, :keys].softmax(-1)
    expected = -(p * p.log()).sum(-1, keepdim=True) / math.log(keys) if keys > 1 else torch.zeros(3, 1).double()
    torch.testing.assert_close(row_entropy(scores, unseen), expected)
    torch.testing.assert_close(row_entropy(torch.zeros(3, 12), unseen), torch.full((3, 1), float(keys > 1)))


def test_row_entropy_has_finite_gradients_where_nothing_is_visible() -> None:
    scores = (100 * draw(0, 3, 4)).requires_grad_()
    unseen = torch.tensor([[True] * 4, [True] * 3 + [False], [False] * 4])
    entropy = row_entropy(scores, unseen)
    entropy.sum().backward()
    assert entropy[:2].tolist() == [[0], [0]]
    assert scores.grad is not None
    assert bool(scores.grad.isfinite().all())
    assert not scores.grad[:2].any()


@pytest.mark.parametrize("sizes", [(2, 3, 5, 7), (4,), (0, 3)])
def test_sums_by_piece_are_those_of_one_addition_after_the_other(sizes: tuple[int, ...]) -> None:
    grad, x = draw(0, *sizes), draw(1, *sizes)
    piece = torch.randint(0, 5, sizes, dtype=torch.int32, generator=torch.Generator().manual_seed(2))
    expected = [torch.zeros(6).double().index_add(0, piece.flatten(), each.flatten()) for each in (grad * x, grad)]
    torch.testing.assert_close(sums_by_piece(grad, x, piece, 6), torch.stack(expected, 1))


def test_sums_by_piece_show_that_a_gradient_is_not_finite() -> None:
    piece = torch.zeros(2, 3, dtype=torch.int32)
    for bad in (math.nan, math.inf):
        grad = torch.ones(2, 3)
        grad[1, 1] = bad
        assert not bool(sums_by_piece(grad, torch.ones(2, 3), piece, 2).isfinite().all())
    assert not sums_by_piece(torch.zeros(2, 3), torch.ones(2, 3), piece, 2).any()
