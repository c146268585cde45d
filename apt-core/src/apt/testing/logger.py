"""Checks of what is told the events of a run: loggers."""

from __future__ import annotations

import tempfile
from pathlib import Path

from apt.core.providers import LoggerProvider
from apt.testing.kit import Subject, check

EVENTS: tuple[dict[str, object], ...] = (
    {
        "event": "train",
        "step": 1,
        "epoch": 0,
        "split": "train",
        "loss": 2.5,
        "learning_rate": 1e-3,
        "gradient_norm": None,
        "values": {"route_temp": 1.5},
        "plugins_on": ["moe"],
    },
    {"event": "switch", "step": 1, "epoch": 0, "plugin": "moe", "loss_before": 2.5, "loss_after": 2.5},
    {"event": "evaluation", "step": 1, "epoch": 0, "loss": 2.4, "bits_per_byte": 3.5, "moe_load": [0.25, 0.75]},
    {"event": "sample", "step": 1, "epoch": 0, "text": "naïve “text” with `marks`\nand lines"},
)
"""One of each form: numbers, none where one was not finite, a vector, words, scheduled values."""


@check("logger")
def takes_every_event(subject: Subject) -> None:
    """It takes every form of event, is closed, goes on where the run is resumed, and back where it can."""
    assert isinstance(subject.provider, LoggerProvider)
    with tempfile.TemporaryDirectory() as folder:
        for resumed_at in (None, 1):
            logger = subject.provider.open(Path(folder), {"name": "a run", "model": {"d_model": 64}}, resumed_at)
            try:
                for event in EVENTS:
                    logger.log({**event, "step": 2 if resumed_at else 1})
                if callable(go_back := getattr(logger, "go_back", None)):
                    go_back(1)
                    logger.log({**EVENTS[0], "step": 2})
            finally:
                logger.close()
