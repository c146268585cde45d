"""What several of these measurements need: profiles from text, a clock, contenders by turns, plugins that do nothing."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from apt.core.config import APTConfig
from apt.core.profile import load_profile
from apt.core.providers import Plugin
from apt.hookspecs import Batch, RunState, hookimpl


def config_of(text: str) -> APTConfig:
    """The configuration that a profile, given as text, means."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        return load_profile(Path(file.name)).config


def clock() -> float:
    """Seconds: of the processor where one thread works, so that other programs count little, else of the clock.

    Where the process uses a GPU, the clock's when all that was asked of it is done.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def by_turns(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in every round, all in turn, after two rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name, run in runs.items():
            start = clock()
            run()
            if number >= 2:
                times[name].append(clock() - start)
    return times


class Idle(Plugin):
    """Implements every hook of a step and does nothing."""

    @hookimpl
    def apt_step_start(self, state: RunState) -> None:
        """Nothing."""

    @hookimpl
    def apt_batch_prepare(self, state: RunState, batch: Batch) -> None:
        """Nothing."""

    @hookimpl
    def apt_loss_extra(self, state: RunState, batch: Batch) -> None:
        """Nothing."""

    @hookimpl
    def apt_gradients_ready(self, state: RunState) -> None:
        """Nothing."""

    @hookimpl
    def apt_step_end(self, state: RunState, metrics: dict[str, float]) -> None:
        """Nothing."""
