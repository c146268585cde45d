"""The learning rate: warm-up, then a schedule down to its floor."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt.core.config import APTConfig, Training
from apt.training.optim import learning_rate

SHAPES = ["cosine", "linear", "wsd", "constant"]


def config(shape: str, **fields: float) -> APTConfig:
    training = Training(max_steps=100, lr_schedule=shape, min_lr_ratio=0.1)  # type: ignore[arg-type]
    return APTConfig(**{"training": training, "base_lr": 2.0, "warmup_steps": 20, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        ("cosine", {20: 2.0, 60: 1.1, 100: 0.2, 40: 0.2 + 1.8 * (1 + math.cos(math.pi / 4)) / 2}),
        ("linear", {20: 2.0, 60: 1.1, 100: 0.2, 40: 1.55}),
        ("wsd", {20: 2.0, 60: 2.0, 84: 2.0, 92: 1.1, 100: 0.2}),
        ("constant", {20: 2.0, 60: 2.0, 100: 2.0}),
    ],
)
def test_each_schedule_has_these_values(shape: str, values: dict[int, float]) -> None:
    rate = learning_rate(config(shape), 100)
    assert [rate(step) for step in range(20)] == pytest.approx([2.0 * (step + 1) / 20 for step in range(20)])
    assert {step: rate(step) for step in values} == pytest.approx(values)


@given(shape=st.sampled_from(SHAPES), warmup=st.integers(0, 60), steps=st.integers(1, 60), low=st.floats(0, 1))
def test_it_rises_to_its_height_and_never_again(shape: str, warmup: int, steps: int, low: float) -> None:
    training = Training(max_steps=steps, lr_schedule=shape, min_lr_ratio=low)  # type: ignore[arg-type]
    rate = learning_rate(APTConfig(training=training, base_lr=2.0, warmup_steps=warmup), warmup + steps)
    rates = [rate(step) for step in range(warmup + steps)]
    assert all(earlier < later for earlier, later in pairwise(rates[:warmup]))
    assert all(earlier >= later - 1e-12 for earlier, later in pairwise(rates[warmup:]))
    assert max(rates) == pytest.approx(2.0)
    assert min(rates[warmup:]) >= 2.0 * low - 1e-12
