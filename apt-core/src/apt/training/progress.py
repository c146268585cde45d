"""What is shown while training: a live bar with the numbers below it on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from apt.core.shown import to_nowhere
from apt.hookspecs import RunState

PLAIN_EVERY = 10.0
"""Seconds between lines where the output is no terminal."""
RECENT = 3600.0
"""Seconds whose steps say how long the rest takes; two reports must fall into them, however slow the steps are."""


class Lasting(Console):
    """A console that outlives its readers: once they have gone, as after ``| head``, it prints nowhere."""

    def on_broken_pipe(self) -> None:
        """What is left in the stream's buffer goes nowhere either, where rich would end the process."""
        self.quiet = True
        to_nowhere(self.file.fileno())


class _Bar(Progress):
    """The bar, and lines of text below it."""

    below: tuple[str, ...] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        """What is drawn."""
        yield self.make_tasks_table(self.tasks)
        for line in self.below:
            yield Text(line, style="dim", no_wrap=True, overflow="ellipsis")


class Report:
    """A context in which `step` moves the bar and `line` prints above it."""

    def __init__(self, console: Console, name: str, done: int, total: int) -> None:
        self.console, self.total = console, total
        self._bar = _Bar(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=RECENT,
            transient=True,
            expand=True,
        )
        self._task = self._bar.add_task(name, total=total, completed=done)
        self._printed = time.monotonic()

    def __enter__(self) -> Report:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, state: RunState, loss: float, tokens_per_second: float, used: float | None, rate: float) -> None:
        """Show where the run stands: `used` is the share of the devices' peak, `rate` the learning rate."""
        share = "" if used is None else f"  MFU {used:.1%}"
        plugins = "+".join(state.plugins_on) or "no plugin"
        status = f"loss {loss:.3f}  {tokens_per_second:,.0f} tok/s{share}  lr {rate:.1e}  {plugins}"
        values = "  ".join(f"{name} {value:.3g}" for name, value in state.values.items())
        self._bar.below = (f"  {status}", f"  {values}") if values else (f"  {status}",)
        self._bar.update(self._task, completed=state.step)
        if not self.console.is_terminal and time.monotonic() - self._printed >= PLAIN_EVERY:
            self._printed = time.monotonic()
            left = self._bar.tasks[0].time_remaining
            eta = "" if left is None else f"{left:.0f} s left"
            self.line("  ".join(filter(None, (f"step {state.step}/{self.total}", status, values, eta))))

    def line(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
