"""What is shown while training: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY = 10.0
"""Seconds between lines where the output is no terminal."""


class Report:
    """A context in which `step` moves the bar and `line` prints above it."""

    def __init__(self, console: Console, name: str, done: int, total: int) -> None:
        self.console, self.total = console, total
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task(name, total=total, completed=done, status="")
        self._printed = time.monotonic()

    def __enter__(self) -> Report:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(
        self,
        done: int,
        loss: float,
        tokens_per_second: float,
        rate: float,
        on: tuple[str, ...],
        values: Mapping[str, float],
    ) -> None:
        """Show where the run stands."""
        plugins = "+".join(on) or "no plugin"
        status = f"loss {loss:.3f}  {tokens_per_second:,.0f} tok/s  lr {rate:.1e}  {plugins}"
        self._bar.update(self._task, completed=done, status=status)
        if not self.console.is_terminal and time.monotonic() - self._printed >= PLAIN_EVERY:
            self._printed = time.monotonic()
            more = "".join(f"  {name} {value:.3g}" for name, value in values.items())
            left = self._bar.tasks[0].time_remaining
            eta = "" if left is None else f"  {left:.0f} s left"
            self.line(f"step {done}/{self.total}  {status}{more}{eta}")

    def line(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
