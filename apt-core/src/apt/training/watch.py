"""What a run keeps an eye on beside the model: the clock, the sums of its losses, and the signals that end it."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor


class Stopwatch:
    """Sums of losses, and the time that training takes, between two lines of the log.

    `saved` is what `save` said of another, which is gone on with; of several ranks one takes over its sums (`whole`).
    """

    def __init__(self, saved: Mapping[str, Any] | None = None, *, whole: bool = True) -> None:
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._tokens, self._since = 0, time.perf_counter()
        if saved is not None:
            totals = {name: torch.tensor(total if whole else 0.0) for name, (total, _) in saved["sums"].items()}
            self._sums = {name: (totals[name], steps) for name, (_, steps) in saved["sums"].items()}
            self._tokens, self._since = saved["tokens"], self._since - saved["seconds"]

    def save(self, sum_up: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> dict[str, Any]:
        """What there is since the last line, as JSON values; `sum_up` gives the sums of all ranks."""
        totals = sum_up({name: total for name, (total, _) in self._sums.items()})
        return {
            "sums": {name: [totals[name].item(), steps] for name, (_, steps) in self._sums.items()},
            "tokens": self._tokens,
            "seconds": time.perf_counter() - self._since,
        }

    def add(self, name: str, value: Tensor) -> None:
        """A loss of a step, once a step."""
        total, steps = self._sums.get(name, (0.0, 0))
        self._sums[name] = total + value, steps + 1

    def done(self, tokens: int) -> None:
        """A step is over."""
        self._tokens += tokens

    def read(self) -> tuple[dict[str, Tensor], float]:
        """Mean losses and tokens a second since the last reading; a step that did not have a loss does not count in its mean."""
        means = {name: total / steps for name, (total, steps) in self._sums.items()}
        speed = self._tokens / max(1e-9, time.perf_counter() - self._since)
        self._sums, self._tokens, self._since = {}, 0, time.perf_counter()
        return means, speed

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in here is not training time."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - start


LASTING = 10
"""Steps in a row whose losses are spikes, after which they are none: the loss has moved."""


class SpikeDetector:
    """Says which losses lie far above those of the last `window` steps.

    `saved` is what `save` said of another, whose judgement is gone on with.
    """

    def __init__(self, deviations: float, window: int = 50, saved: Mapping[str, Any] | None = None) -> None:
        self.deviations, self._row = deviations, 0 if saved is None else saved["row"]
        self._last: deque[float] = deque(() if saved is None else saved["last"], maxlen=window)

    def save(self) -> dict[str, Any]:
        """What later losses are held against, as JSON values."""
        return {"row": self._row, "last": [*self._last]}

    def is_spike(self, loss: float) -> bool:
        """Whether this step's loss is one.

        A spike does not count in what later ones are held against; where all are spikes, they are held against where the loss
        is now.
        """
        if len(self._last) == self._last.maxlen:
            mean = sum(self._last) / len(self._last)
            deviation = math.sqrt(sum((each - mean) ** 2 for each in self._last) / len(self._last))
            if loss > mean + self.deviations * deviation:
                self._row += 1
                if self._row <= LASTING:
                    return True
                self._last.clear()
        self._row = 0
        self._last.append(loss)
        return False


@contextlib.contextmanager
def stop_signals(stop: Callable[[str], None]) -> Iterator[None]:
    """Call `stop` with the name of the first SIGINT or SIGTERM; a second one leaves at once (`KeyboardInterrupt`).

    Outside of the main thread, where signals cannot be taken, nothing is done.
    """
    seen = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        if seen:
            raise KeyboardInterrupt
        seen = True
        stop(signal.Signals(number).name)

    try:
        before = {each: signal.signal(each, handle) for each in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
