"""The losses of a run over both switches: what a rewrite of anything must not move."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from apt.core.config import APTConfig
from apt.training.record import read_metrics
from apt.training.trainer import Trainer

LOSSES = ()
HELD_OUT = ()
NEAR = 5e-4
"""Nats: what other processors' order of adding up may change over the steps. A changed formula moves the curve by more."""


def test_the_loss_curve_is_the_one_it_was(tiny: APTConfig, tmp_path: Path) -> None:
    Trainer(tiny, tmp_path / "run", console=Console(file=io.StringIO())).fit()
    events = read_metrics(tmp_path / "run")
    losses = [event["loss"] for event in events if event["event"] == "step"]
    held_out = [event["loss"] for event in events if event["event"] == "evaluation"]
    print(losses, held_out)
    assert losses == pytest.approx(LOSSES, abs=NEAR)
    assert held_out == pytest.approx(HELD_OUT, abs=NEAR)
