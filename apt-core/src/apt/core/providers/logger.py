"""Loggers: where the events of a run go beside its own `metrics.jsonl`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

from apt.core.provider import Provider


class Logger(Protocol):
    """One run's connection to what collects metrics. Only the main rank has any.

    It may have a method ``go_back(step)`` too, which is called where the run goes back to a checkpoint of that step
    (``on_nonfinite: rewind``): what was logged beyond it is to be forgotten, and what stays true of it is logged again.
    """

    def log(self, event: Mapping[str, object]) -> None:
        """An event as `metrics.jsonl` has it: `event`, `step`, `epoch`, and what belongs to it. `scalars` gives its numbers."""

    def close(self) -> None:
        """The run is over, or was interrupted."""


class LoggerProvider(Provider):
    """Connects a run to what collects metrics. A profile lists them in `monitoring.loggers`."""

    kind: ClassVar[str] = "logger"

    @abstractmethod
    def open(self, folder: Path, profile: Mapping[str, object], resumed_at: int | None) -> Logger:
        """Begin, or go on where a run is resumed: what was logged beyond step `resumed_at` is to be forgotten.

        `folder` is the run's own, which the logger may write to; `profile` is the resolved profile in its canonical form. An
        error ends the run before its first step. One in `log` does not: it is told, and the logger is left out from then on.
        """


def scalars(event: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    """The numbers of an event by name: ``train/loss``, ``evaluation/load/0/3`` of a vector or table, ``schedule/route_temp``."""
    for key, value in event.items():
        if key == "values" and isinstance(value, Mapping):
            yield from ((f"schedule/{name}", float(each)) for name, each in value.items())
        elif key not in ("event", "step", "epoch"):
            yield from _numbers(f"{event['event']}/{key}", value)


def _numbers(name: str, value: object) -> Iterator[tuple[str, float]]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield name, float(value)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for index, each in enumerate(value):
            yield from _numbers(f"{name}/{index}", each)
