import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apt_align import functional

DISTANCES = [functional.cosine, functional.l2, functional.kl]
Distance = Callable[[Tensor, Tensor], Tensor]
scales = st.floats(1e-3, 1e3)
seeds = st.integers(0, 999)


def states(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    one, two = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
    return one, two


@pytest.mark.parametrize("distance", DISTANCES)
@given(seed=seeds, scale=scales)
def test_equal_states_are_at_distance_0_and_others_are_not(distance: Distance, seed: int, scale: float) -> None:
    one, two = states(seed, 2, 5, 7)
    torch.testing.assert_close(distance(scale * one, scale * one), torch.zeros(2, 5), rtol=0, atol=1e-5)
    assert (distance(one, two) > 0).all()


@pytest.mark.parametrize("distance", [functional.cosine, functional.l2])
@given(seed=seeds, scale=scales)
def test_directions_alone_count_so_that_shrinking_gains_nothing(distance: Distance, seed: int, scale: float) -> None:
    one, two = states(seed, 2, 5, 7)
    torch.testing.assert_close(distance(scale * one, two), distance(one, two), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(distance(two, one), distance(one, two))


@given(seeds)
def test_l2_is_twice_the_cosine_distance(seed: int) -> None:
    one, two = states(seed, 3, 7)
    torch.testing.assert_close(functional.l2(one, two), 2 * functional.cosine(one, two), rtol=1e-4, atol=1e-5)


def test_kl_is_the_divergence_of_the_softened_distributions_times_the_squared_temperature() -> None:
    teacher, student = states(0, 4, 6)
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    torch.testing.assert_close(functional.kl(teacher, student, 2.0), 4 * (p * (p / q).log()).sum(-1))


def test_a_higher_temperature_leaves_the_size_of_the_gradient() -> None:
    teacher, student = states(0, 50, 20)
    norms = []
    for temperature in (10.0, 100.0):
        free = student.clone().requires_grad_()
        functional.kl(teacher, free, temperature).mean().backward()
        norms.append(free.grad.norm())
    torch.testing.assert_close(norms[0], norms[1], rtol=0.1, atol=0)


def test_nce_is_log_tokens_for_a_constant_state_and_less_for_one_that_tells_tokens_apart() -> None:
    constant = torch.ones(2, 8, 5)
    torch.testing.assert_close(functional.nce(constant, constant), torch.full((2, 8), math.log(16)))
    distinct = torch.eye(16).view(2, 8, 16)
    assert (functional.nce(distinct, distinct) < 0.1).all()


def test_nce_is_the_textbook_formula() -> None:
    teacher, student = states(3, 6, 4)
    scores = torch.cosine_similarity(student.unsqueeze(1), teacher.unsqueeze(0), dim=-1) / 0.2
    expected = torch.nn.functional.cross_entropy(scores, torch.arange(6), reduction="none")
    torch.testing.assert_close(functional.nce(teacher, student, 0.2), expected)


def test_nce_does_not_compare_with_padding() -> None:
    teacher, student = states(4, 2, 6, 4)
    counted = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    alone = functional.nce(teacher[counted], student[counted])
    torch.testing.assert_close(functional.nce(teacher, student, counted=counted)[counted], alone)


def test_nce_of_many_tokens_compares_with_a_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "MAX_NEGATIVES", 8)
    constant = torch.ones(4, 5, 3)
    others = functional.nce(constant, constant).exp().round()
    assert set(others.flatten().tolist()) == {7.0, 8.0}  # 20 tokens, every third: itself among them or not


@given(st.integers(1, 5), st.integers(1, 5))
def test_the_mean_is_over_tokens_whatever_the_shape_of_the_batch(batch: int, seq: int) -> None:
    distances = torch.rand(batch, seq)
    repeated = distances.repeat(3, 2)
    torch.testing.assert_close(functional.mean(repeated), functional.mean(distances))


def test_the_mean_leaves_out_padding_and_an_empty_batch_has_mean_0() -> None:
    distances = torch.tensor([[1.0, 2.0, 50.0]])
    assert functional.mean(distances, torch.tensor([[True, True, False]])) == 1.5
    assert functional.mean(distances, torch.zeros(1, 3, dtype=torch.bool)) == 0


@pytest.mark.parametrize("distance", [*DISTANCES, functional.nce])
def test_in_bfloat16_everything_is_finite_and_zeros_have_a_gradient(distance: Distance) -> None:
    one, two = states(5, 1, 4, 6)
    assert distance(30 * one.bfloat16(), 30 * two.bfloat16()).isfinite().all()
    zeros = torch.zeros(1, 4, 6, requires_grad=True)
    distance(one, zeros).sum().backward()
    assert zeros.grad is not None
    assert zeros.grad.isfinite().all()


@pytest.mark.parametrize("debiased", [True, False])
@given(seed=seeds, scale=scales)
def test_cka_is_1_for_a_rotation_and_a_scale_and_symmetric(debiased: bool, seed: int, scale: float) -> None:
    one, two = states(seed, 40, 6)
    rotation = torch.linalg.qr(two[:6])[0]
    alike = functional.cka(one, scale * one @ rotation + 3, debiased=debiased)
    torch.testing.assert_close(alike, torch.ones(()), rtol=1e-4, atol=1e-4)
    there, back = (functional.cka(*pair, debiased=debiased) for pair in ((one, two), (two, one)))
    torch.testing.assert_close(there, back)


def test_plain_cka_is_the_paper_s_formula_and_the_debiased_one_does_not_flatter_few_tokens() -> None:
    one, two = states(1, 30, 8)
    x, y = one - one.mean(0), two - two.mean(0)
    expected = (y.t() @ x).norm() ** 2 / ((x.t() @ x).norm() * (y.t() @ y).norm())
    torch.testing.assert_close(functional.cka(one, two, debiased=False), expected)
    wide = [functional.cka(*states(seed, 20, 200)).item() for seed in range(30)]
    assert functional.cka(*states(0, 20, 200), debiased=False) > 0.8
    assert abs(sum(wide) / len(wide)) < 0.05


def test_cka_compares_states_of_different_widths_and_refuses_too_few_tokens() -> None:
    one, _ = states(2, 30, 8)
    torch.testing.assert_close(functional.cka(one, torch.cat([one, one], -1)), torch.ones(()))
    with pytest.raises(ValueError, match="at least 4 tokens, not 3"):
        functional.cka(one[:3], one[:3])


def test_nce_under_autocast_is_what_it_is_without() -> None:
    one, two = states(0, 2, 5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = functional.nce(one, two)
    torch.testing.assert_close(rounded, functional.nce(one, two))
