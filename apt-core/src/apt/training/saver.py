"""Which checkpoints a run keeps, and when they are written: in the step itself, or by a thread beside it."""

from __future__ import annotations

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from apt.training.checkpoint import BEST, LATEST, Snapshot, list_checkpoints, point, write_snapshot
from apt.training.ranks import ALONE, Ranks


class Saver:
    """Writes the snapshots of one run. Kept are the last `keep_last` and, with `keep_best`, the one of the lowest loss.

    Only when a checkpoint is whole and pointed to is an older one removed. Checkpoints of later steps than the one that is
    written, left over from a run that was resumed from an earlier one, stay until they are overtaken. With `ranks` of more than
    one, all of them save: each has a part of every snapshot.
    """

    def __init__(self, run: Path, *, keep_last: int, keep_best: bool, asynchronous: bool, ranks: Ranks = ALONE) -> None:
        self.run, self.keep_last, self.keep_best = run, keep_last, keep_best
        # What a thread says to other ranks must not come between what training says to them.
        self.ranks = ranks.beside() if asynchronous else ranks
        self.best: float | None = None
        self._pool = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._writing: Future[None] | None = None

    @property
    def copies(self) -> bool:
        """Whether a snapshot must be a copy, since training goes on while it is written."""
        return self._pool is not None

    def save(self, snapshot: Snapshot, loss: float | None = None) -> None:
        """Write a snapshot, whose held-out loss is `loss`. Raises `CheckpointError`, also for the one before."""
        self.wait()
        is_best = self.keep_best and loss is not None and (self.best is None or loss < self.best)
        if is_best:
            self.best = loss
        if self._pool is None:
            self._write(snapshot, is_best)
        else:
            self._writing = self._pool.submit(self._write, snapshot, is_best)

    def wait(self) -> None:
        """Until what was handed over is on the disk. Raises `CheckpointError` where it is not."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Write what was handed over; no more snapshots."""
        try:
            self.wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown()

    def _write(self, snapshot: Snapshot, is_best: bool) -> None:
        folder = write_snapshot(self.run, snapshot, self.ranks)
        if not self.ranks.is_main:
            return
        if is_best:
            point(self.run, BEST, folder)
        named = {(self.run / name).read_text().strip() for name in (LATEST, BEST) if (self.run / name).is_file()}
        done = [each for each in list_checkpoints(self.run) if each.name <= folder.name]
        for old in done[: -self.keep_last]:
            if old.name not in named:
                shutil.rmtree(old)
