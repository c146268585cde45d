"""A run's folder is held by the one run that trains into it: two would scramble its metrics and remove each other's checkpoints.

Who only reads a run, such as `generate` or a branch of it, asks for nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import filelock

from apt.data.cache import has_no_locks
from apt.errors import UserError
from apt.training.ranks import Ranks

HELD = ".held"
"""The file that is locked while a process trains there. One that is left over, or copied with the folder, says nothing."""


def is_empty(run: Path) -> bool:
    """Whether nothing is in a folder that might be a run's, or it is not there."""
    return not run.is_dir() or all(each.name == HELD for each in run.iterdir())


@contextlib.contextmanager
def hold(run: Path, ranks: Ranks, warn: Callable[[str], None]) -> Iterator[None]:
    """Make a run's folder, and keep other runs out of it. Folders that were made, and are empty at the end, go again.

    A process that is killed lets go too. Raises `UserError`, on all ranks, where another process trains there.
    """
    with contextlib.ExitStack() as held:
        fault = _take(run, held, warn) if ranks.is_main else None
        fault = ranks.gather(fault)[0]
        if fault is not None:
            raise UserError(fault)
        yield


def _take(run: Path, held: contextlib.ExitStack, warn: Callable[[str], None]) -> str | None:
    """Take the lock until `held` ends; or what is wrong with the folder, in words."""
    if run.exists() and not run.is_dir():
        return f"{run}: is a file; give a folder as --out"
    made = [each for each in (run, *run.parents) if not each.exists()]
    run.mkdir(parents=True, exist_ok=True)
    held.callback(_remove_empty, made)
    lock = filelock.FileLock(run / HELD)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return f"{run}: another process trains there; wait for its end, or give another --out"
    except (OSError, NotImplementedError) as error:
        if not has_no_locks(error):
            raise
        warn(
            f"{run}: this file system has no locks; nothing keeps another process from training there at the same time"
        )
    held.callback(lock.release)
    held.callback((run / HELD).unlink, missing_ok=True)
    return None


def _remove_empty(folders: Iterable[Path]) -> None:
    with contextlib.suppress(OSError):  # it holds something
        for each in folders:
            each.rmdir()
