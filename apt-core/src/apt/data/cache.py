"""What can be made again: written once, whole or not at all, by one process at a time, and checked when it is read."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apt.data.files import expanded
from apt.errors import DataError

MANIFEST = "manifest.json"
VARIABLE = "APT_CACHE_DIR"
_OF_THE_DISK = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}
)

_IN_THE_WAY = frozenset({errno.ENOTEMPTY, errno.EEXIST})
_WITHOUT_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})


@dataclass(frozen=True)
class Entry:
    """A folder of the cache, and what its maker wanted remembered."""

    folder: Path
    facts: dict[str, Any]


class Cache:
    """Entries by kind and key. `root` is ``data.cache``, else the environment's APT_CACHE_DIR, else the platform's folder."""

    def __init__(self, root: str | Path | None = None, note: Callable[[str], None] = print) -> None:
        import platformdirs

        chosen, option = (os.environ.get(VARIABLE), VARIABLE) if root is None else (root, "data.cache")
        self.root = expanded(chosen, option) if chosen else platformdirs.user_cache_path("apt-core")
        self.note = note

    def get(self, kind: str, key: Mapping[str, object], make: Callable[[Path], Mapping[str, object]]) -> Entry:
        """The entry of this key; where there is none, or it is damaged, `make` fills a new folder and says what to remember.

        Raises `DataError` where the folder cannot be written.
        """
        folder = self.root / kind / digest_of(key)
        if (entry := self._read(folder)) is not None:
            return entry
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with self._place(kind, folder) as part:
                # Another process may just have made it; damage was told above.
                return self._read(folder, tell=False) or self._make(folder, part, key, make)
        except OSError as error:
            if error.errno not in _OF_THE_DISK:  # what `make` reads from may fail in its own ways
                raise
            raise DataError(
                f"data.cache: {self.root}: cannot be written: {error.strerror}; name another folder in data.cache or {VARIABLE}"
            ) from error

    @contextlib.contextmanager
    def _place(self, kind: str, folder: Path) -> Iterator[Path]:
        """Where to make an entry, while no other process makes it; without locks that cannot be known, and each has its own."""
        import filelock

        lock = filelock.FileLock(folder.with_suffix(".lock"))
        part = folder.with_suffix(".part")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            self.note(f"waiting for another process that makes {kind} in {self.root}")
            lock.acquire()
        except (OSError, NotImplementedError) as error:
            if not has_no_locks(error):
                raise
            self.note(
                f"{self.root}: this file system has no locks; another process that makes the same {kind} does so too"
            )
            part = folder.with_suffix(f".{uuid.uuid4().hex}.part")
        try:
            yield part
        finally:
            lock.release()

    def _read(self, folder: Path, *, tell: bool = True) -> Entry | None:
        if not folder.is_dir():
            return None
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            wrong = [name for name, digest in manifest["files"].items() if file_digest(folder / name) != digest]
            if not wrong:
                with contextlib.suppress(OSError):  # it may be somebody else's, to be read alone
                    os.utime(folder)  # when it was used last
                return Entry(folder, manifest["facts"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            wrong = [f"{MANIFEST}: {error}"]
        if tell:
            self.note(f"{folder} is damaged ({', '.join(wrong)}) and is made anew")
        return None

    def _make(
        self, folder: Path, part: Path, key: Mapping[str, object], make: Callable[[Path], Mapping[str, object]]
    ) -> Entry:
        shutil.rmtree(part, ignore_errors=True)
        try:
            part.mkdir()
            facts = dict(make(part))
            files = {path.name: file_digest(path) for path in sorted(part.iterdir())}
            manifest = {"key": dict(key), "facts": facts, "files": files}
            (part / MANIFEST).write_text(json.dumps(manifest, indent=1))
            while True:
                try:
                    part.rename(folder)
                    return Entry(folder, facts)
                except OSError as error:
                    if error.errno not in _IN_THE_WAY:
                        raise
                # Without locks another process may have been quicker, and read by now what it has made.
                if (entry := self._read(folder, tell=False)) is not None:
                    return entry
                with contextlib.suppress(FileNotFoundError):  # so may it have been in removing what is damaged
                    shutil.rmtree(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def has_no_locks(error: Exception) -> bool:
    """Whether a lock was refused since the file system, or the platform, has none."""
    return isinstance(error, NotImplementedError) or getattr(error, "errno", None) in _WITHOUT_LOCKS


def digest_of(key: Mapping[str, object]) -> str:
    """A name for a key."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
