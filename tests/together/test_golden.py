"""The losses of a run over both switches, experts at step 5 and alignment at 10: what a rewrite must not move."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from apt.core.config import APTConfig
from apt.training.record import read_metrics
from apt.training.trainer import Trainer

LOSSES = (
    5.5741,
    5.5150,
    5.3850,
    5.2497,
    5.1292,
    5.0102,
    4.8956,
    4.7901,
    4.6825,
    4.5765,
    4.4852,
    4.4298,
    4.3449,
    4.2895,
    4.2284,
    4.1840,
    4.1552,
    4.1237,
    4.1123,
    4.1072,
)
HELD_OUT = (5.0286, 4.5120, 4.2170, 4.1107)
NEAR = 5e-4
"""Nats: what other processors' order of adding up may change over the steps. A changed formula moves the curve by more."""


def test_the_loss_curve_is_the_one_it_was(tiny: APTConfig, tmp_path: Path) -> None:
    Trainer(tiny, tmp_path / "run", console=Console(file=io.StringIO())).fit()
    events = read_metrics(tmp_path / "run")
    losses = [event["loss"] for event in events if event["event"] == "train"]
    held_out = [event["loss"] for event in events if event["event"] == "evaluation"]
    assert losses == pytest.approx(LOSSES, abs=NEAR)
    assert held_out == pytest.approx(HELD_OUT, abs=NEAR)
