"""The lock: exactly which code, with which options, made a model. Each checkpoint holds one.

For every provider in use, nested ones and plugins too: kind, name, distribution, version, a digest of the source and a
digest of all its options, defaults included (a default that changes with a new version changes the model).
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from importlib.machinery import all_suffixes
from pathlib import Path

from apt.core.discovery import REGISTERED, ProviderRecord, find_source
from apt.core.options import canonical
from apt.core.provider import Provider
from apt.core.resolution import record_of
from apt.core.resolve import Resolved
from apt.errors import CheckpointError, Fault

_CODE = frozenset({*all_suffixes(), ".cpp", ".cu", ".cuh", ".h"}) - {".pyc"}
UNKNOWN = "unknown"
"""The digest of source that cannot be found, such as a class typed into a prompt."""


@dataclass(frozen=True)
class Locked:
    """One provider in use, pinned. `where` is its dotted path in the profile."""

    where: str
    kind: str
    name: str
    distribution: str
    version: str
    source: str
    options: str


@dataclass(frozen=True)
class Lock:
    """All providers of a model, in the order of the profile."""

    entries: tuple[Locked, ...]

    def to_dict(self) -> dict[str, dict[str, str]]:
        """JSON values: the dotted path, and what stands there."""
        return {entry.where: {k: v for k, v in asdict(entry).items() if k != "where"} for entry in self.entries}

    @classmethod
    def from_dict(cls, saved: Mapping[str, object]) -> Lock:
        """What `to_dict` wrote. Raises `CheckpointError` where it is damaged."""
        words = {field.name for field in fields(Locked)} - {"where"}
        entries: list[Locked] = []
        for where, entry in saved.items():
            if not isinstance(entry, Mapping) or set(entry) != words:
                raise CheckpointError(f"the lock is damaged at {where}: it must hold {', '.join(sorted(words))}")
            entries.append(Locked(where=where, **{word: str(entry[word]) for word in words}))
        return cls(tuple(entries))

    @property
    def digest(self) -> str:
        """One hash of everything: the ranks of a run compare it before the first step."""
        return _sha256(canonical(self.to_dict()).encode())


def make_lock(resolved: Resolved) -> Lock:
    """Pin the providers of a resolved profile; loggers make no model, and may change."""
    parts = ((where, provider) for where, provider in resolved.parts() if provider.kind != "logger")
    return Lock(tuple(_pin(where, provider) for where, provider in parts))


def compare(saved: Lock, now: Lock) -> list[Fault]:
    """What differs between the lock of a checkpoint and the present, in the order of the saved one."""
    present = {entry.where: entry for entry in now.entries}
    faults: list[Fault] = []
    for entry in saved.entries:
        other = present.pop(entry.where, None)
        if other is None:
            faults.append(Fault(entry.where, f"{entry.kind}.{entry.name} is not in use any more"))
            continue
        faults += [Fault(entry.where, what) for what in _differences(entry, other)]
    faults += [Fault(where, f"{entry.kind}.{entry.name} is new") for where, entry in present.items()]
    return faults


def check_lock(saved: Lock, now: Lock, *, strict: bool) -> list[Fault]:
    """What differs, for a warning. Raises `CheckpointError` with all of it where `strict`."""
    faults = compare(saved, now)
    if strict and faults:
        lines = "\n".join(f"  {fault}" for fault in faults)
        raise CheckpointError(f"the checkpoint was made by other providers than those here:\n{lines}")
    return faults


def _differences(saved: Locked, now: Locked) -> Iterable[str]:
    if (saved.kind, saved.name) != (now.kind, now.name):
        yield f"was {saved.kind}.{saved.name}, is {now.kind}.{now.name}"
        return
    if saved.distribution != now.distribution:
        yield f"came with {saved.distribution} {saved.version}, comes with {now.distribution} {now.version}"
    elif saved.version != now.version:
        yield f"{saved.distribution} was {saved.version}, is {now.version}"
    elif saved.source != now.source:
        yield f"the source of {saved.distribution} {saved.version} has changed"
    if saved.options != now.options:
        yield "its options differ"


def _pin(where: str, provider: Provider) -> Locked:
    record = record_of(provider)
    options = _sha256(canonical(provider.model_dump(mode="json")).encode())
    source = record.sha256 or _hash_source(_source(record, provider))
    return Locked(where, record.kind, record.name, record.distribution, record.version, source, options)


def _source(record: ProviderRecord, provider: Provider) -> Path | None:
    if record.distribution != REGISTERED:
        return find_source(record.entry_point)
    try:
        file = inspect.getsourcefile(type(provider))
    except (OSError, TypeError):  # typed into a prompt
        return None
    return None if file is None else Path(file)


@functools.lru_cache(maxsize=256)
def _hash_source(path: Path | None) -> str:
    """The digest of a file, or of all code in a package's folder with its names; once a process, as code is loaded."""
    if path is None or not path.exists():
        return UNKNOWN
    if path.is_file():
        return _sha256(path.read_bytes())
    files = sorted(
        (file.relative_to(path).as_posix(), file)
        for file in path.rglob("*")
        if file.suffix in _CODE and "__pycache__" not in file.parts
    )
    return _sha256("\n".join(f"{name} {_sha256(file.read_bytes())}" for name, file in files).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
