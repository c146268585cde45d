"""The loggers of a run, all of them as one; one that fails later on is left out, and the run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from apt.core.providers import Logger, LoggerProvider
from apt.core.resolution import record_of


class Loggers:
    """Tells every event to each logger. `tell` prints a line."""

    def __init__(
        self,
        providers: Iterable[LoggerProvider],
        folder: Path,
        profile: Mapping[str, object],
        resumed_at: int | None,
        tell: Callable[[str], object],
    ) -> None:
        self.tell = tell
        self._open: dict[str, Logger] = {}
        try:
            for provider in providers:
                record = record_of(provider)
                name = f"logger {record.name!r} ({record.distribution} {record.version})"
                self._open[name] = provider.open(folder, profile, resumed_at)
        except BaseException:
            self.close()
            raise

    def log(self, event: Mapping[str, object]) -> None:
        """One event."""
        for name, logger in list(self._open.items()):
            self._try(name, lambda logger=logger: logger.log(event))  # type: ignore[misc]

    def go_back(self, step: int, again: Sequence[Mapping[str, object]]) -> None:
        """The run goes back to `step`. Who can forget what came after it is told those events `again` that stay."""
        for name, logger in list(self._open.items()):
            forget = getattr(logger, "go_back", None)
            if callable(forget):
                self._try(name, lambda forget=forget: forget(step))  # type: ignore[misc]
                for event in again:
                    self._try(name, lambda logger=logger, event=event: logger.log(event))  # type: ignore[misc]

    def close(self) -> None:
        """No more events."""
        for name, logger in list(self._open.items()):
            self._try(name, logger.close)
        self._open.clear()

    def _try(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001  a server that is away must not cost hours of training
            self._open.pop(name, None)
            self.tell(
                f"{name} failed and is left out from now on: {type(error).__name__}: {error}; metrics.jsonl goes on"
            )
