"""What is shown while a text is read: a moving line on a terminal, and elsewhere a plain one now and then where it takes long."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

PLAIN_EVERY = 10.0
"""Seconds between lines where the output is no terminal."""


class Telling:
    """A context in which work is announced by `start` and moved on by `advance`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[size]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, start=False, size="")
        self._what, self._total, self._done = "", 0, 0
        self._printed = time.monotonic()

    def __enter__(self) -> Telling:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def start(self, what: str, total: int = 0) -> None:
        """Other work begins, of about `total` bytes where that is known."""
        self._what, self._total, self._done = what, total, 0
        self._bar.reset(self._task, description=what, total=total or None, size="")

    def advance(self, length: int) -> None:
        """So much more is done."""
        self._done += length
        total = f" of {self._total / 1e6:,.0f}" if self._total else ""
        size = f"{self._done / 1e6:,.0f}{total} MB"
        self._bar.update(self._task, advance=length, size=size)
        now = time.monotonic()
        if not self.console.is_terminal and now - self._printed >= PLAIN_EVERY:
            self._printed = now
            self.note(f"{self._what}: {size}")

    def follow(self, texts: Iterable[str]) -> Iterator[str]:
        """The texts, each counted when the next is asked for."""
        for text in texts:
            yield text
            self.advance(len(text))

    def note(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
