"""Which checkpoints a run keeps, and when they are written: in the step itself, or by a thread beside it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path

from apt.training.checkpoint import BEST, LATEST, list_checkpoints, read_pointer
from apt.training.ranks import ALONE, Ranks
from apt.training.snapshot import WRITTEN, Snapshot, point, remove, write_snapshot


class Saver:
    """Writes the snapshots of one run. Kept are the last `keep_last` and, with `keep_best`, the one of the lowest loss.

    Only when a checkpoint is whole and pointed to is an older one removed. Checkpoints of later steps than the one that is
    written, left over from a run that went back, stay until they are overtaken. With `ranks` of more than one, all of them save:
    each has a part of every snapshot.
    """

    def __init__(self, run: Path, *, keep_last: int, keep_best: bool, asynchronous: bool, ranks: Ranks = ALONE) -> None:
        self.run, self.keep_last, self.keep_best = run, keep_last, keep_best
        # What a thread says to other ranks must not come between what training says to them.
        self.ranks = ranks.beside() if asynchronous else ranks
        self.best: float | None = None
        """The lowest held-out loss of a checkpoint."""
        self.last: Path | None = None
        """The checkpoint that was written last."""
        self.copies = asynchronous
        """Whether a snapshot must be a copy, since training goes on while it is written."""
        self._writing: _Writing | None = None

    def is_better(self, loss: float) -> bool:
        """Whether a checkpoint of this held-out loss is to be kept as the best."""
        return self.keep_best and math.isfinite(loss) and (self.best is None or loss < self.best)

    def save(self, snapshot: Snapshot, *, is_best: bool = False) -> None:
        """Write a snapshot. Raises `CheckpointError`, also for the one before."""
        self.wait()
        if self.copies:
            self._writing = _Writing(lambda: self._write(snapshot, is_best))
            self._writing.start()
        else:
            self._write(snapshot, is_best)

    def wait(self) -> None:
        """Until what was handed over is on the disk. Raises `CheckpointError` where it is not."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, snapshot: Snapshot, is_best: bool) -> None:
        folder = self.last = write_snapshot(self.run, snapshot, self.ranks)
        if not self.ranks.is_main:
            return
        if is_best:
            point(self.run, BEST, folder)
        named = {read_pointer(self.run / name) for name in (LATEST, BEST)}
        ordered = list_checkpoints(self.run)
        done = ordered[: ordered.index(folder) + 1]
        for old in done[: -self.keep_last]:
            if old.name not in named and WRITTEN.fullmatch(old.name):
                remove(old)


class _Writing(threading.Thread):
    """A snapshot on its way to the disk. The process does not wait for it where it leaves at once."""

    def __init__(self, write: Callable[[], None]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._write = write
        self._error: BaseException | None = None

    def run(self) -> None:
        """Write; what goes wrong is kept for whoever asks."""
        try:
            self._write()
        except BaseException as error:  # noqa: BLE001  raised again in `result`
            self._error = error

    def result(self) -> None:
        """Wait for the end, and raise what went wrong."""
        self.join()
        if self._error is not None:
            raise self._error
