"""Rotary positions: scores depend on distances alone, and stretched frequencies are those of the papers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from apt.core.providers import RopeScaling
from apt.layers.rope import get_frequencies, get_turn, rotate

YARN = RopeScaling(type="yarn", factor=4, original_max_seq_len=2048)
SCALINGS = [None, RopeScaling(type="linear", factor=2), RopeScaling(type="ntk", factor=2), YARN]


@given(shift=st.integers(0, 1000), scaling=st.sampled_from(SCALINGS))
def test_moving_all_positions_moves_no_score(shift: int, scaling: RopeScaling | None) -> None:
    q, k = (torch.randn(1, 2, 7, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    positions = torch.arange(7).unsqueeze(0)
    here, there = (
        rotate(q, at, 1e4, scaling) @ rotate(k, at, 1e4, scaling).transpose(-1, -2)
        for at in (positions, positions + shift)
    )
    torch.testing.assert_close(here, there, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("scaling", "right"),
    [
        (None, [1.0, 0.05623413, 0.01778279, 0.003162278, 1.333521e-4]),
        (RopeScaling(type="linear", factor=4), [0.25, 0.01405853, 0.004445698, 7.905694e-4, 3.333803e-5]),
        (YARN, [1.0, 0.04974557, 0.01162721, 9.730086e-4, 3.333804e-5]),
        (
            RopeScaling(type="yarn", factor=4, original_max_seq_len=2048, beta_fast=16, beta_slow=2),
            [1.0, 0.05623413, 0.01111425, 7.905695e-4, 3.333804e-5],
        ),
        (
            RopeScaling(type="llama3", factor=4, original_max_seq_len=2048),
            [1.0, 0.05623413, 0.01778279, 8.148734e-4, 3.333804e-5],
        ),
    ],
    ids=lambda each: each.type if isinstance(each, RopeScaling) else "",
)
def test_frequencies_are_those_that_transformers_5_24_computes(scaling: RopeScaling | None, right: list[float]) -> None:
    seen = get_frequencies(64, 1e4, scaling)[[0, 10, 14, 20, 31]]
    torch.testing.assert_close(seen, torch.tensor(right), rtol=2e-6, atol=0)


def test_ntk_slows_the_slowest_pair_by_the_factor_and_the_fastest_not_at_all() -> None:
    ratio = get_frequencies(64, 1e4) / get_frequencies(64, 1e4, RopeScaling(type="ntk", factor=8))
    assert ratio[0].item() == pytest.approx(1)
    assert ratio[-1].item() == pytest.approx(8, rel=1e-5)
    assert (ratio.diff() > 0).all()


def test_yarn_sharpens_logits_by_the_square_of_its_factor() -> None:
    plain, yarn = (get_turn(torch.zeros(1, 1, dtype=torch.long), 8, 1e4, each)[0] for each in (None, YARN))
    torch.testing.assert_close(yarn / plain, torch.full_like(plain, 1.138629436))
    own = YARN.model_copy(update={"attention_factor": 1.5})
    torch.testing.assert_close(get_turn(torch.zeros(1, 1), 8, 1e4, own)[0], torch.full((1, 1, 1, 4), 1.5))


def test_angles_are_exact_in_bfloat16_far_out() -> None:
    x = torch.ones(1, 1, 2, 4, dtype=torch.bfloat16)
    far = rotate(x, torch.tensor([[257, 258]]), 1e4)
    assert not torch.equal(far[:, :, 0], far[:, :, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "yarn", "factor": 4}, "yarn needs original_max_seq_len"),
        ({"type": "linear", "factor": 4, "original_max_seq_len": 9}, "linear does not read original_max_seq_len"),
        ({"type": "ntk", "factor": 0.5}, "greater than or equal to 1"),
        ({"type": "llama3", "factor": 2, "original_max_seq_len": 9, "beta_fast": 3}, "does not read beta_fast"),
        ({"type": "yarn", "factor": 2, "original_max_seq_len": 9, "beta_slow": 40}, "beta_slow 40 must be less"),
        (
            {"type": "llama3", "factor": 2, "original_max_seq_len": 9, "low_freq_factor": 4},
            "low_freq_factor 4 must be less than high_freq_factor 4",
        ),
    ],
)
def test_a_scaling_that_makes_no_sense_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RopeScaling.model_validate(options)
