"""Which providers are installed, from metadata alone: entry points ``<kind>.<name>`` in the group `apt.providers`.

No module of any package is imported. Folders are listed and the few `entry_points.txt` that speak of APT are read,
which is several times faster than `importlib.metadata` over all distributions; what is not a plain folder (a zip
file, another finder) is left to `importlib.metadata`. The first distribution of a name along `sys.path` counts, as
it does for imports. The result is sorted, so that no answer depends on the order in which a disk lists its files.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from apt.errors import Fault

GROUP = "apt.providers"
REGISTERED = "(registered)"
"""Stands for the distribution of a provider that was registered by hand."""
FILE = "(file)"
"""Stands for the distribution of a provider whose code lies in a file beside the profile."""

_NAME = re.compile(r"(?P<kind>[A-Za-z_]\w*)\.(?P<name>[A-Za-z_][\w-]*)")
_TARGET = re.compile(r"(?P<target>[\w.]+:[\w.]+)\s*(\[(?P<extras>[^\]]*)\])?")


@dataclass(frozen=True, slots=True)
class ProviderRecord:
    """What is known of a provider before anything of it is imported, and how it was come by."""

    kind: str
    name: str
    distribution: str
    version: str
    entry_point: str
    """``package.module:Class``."""
    path: str = ""
    """The folder of the distribution's metadata, or the file of local code."""
    extras: tuple[str, ...] = ()
    """The distribution's extras that this entry point needs (``"apt.builtin.tokenizer:BPE [bpe]"``)."""
    disabled: str = ""
    """Why it must not be loaded; empty where it may."""
    sha256: str = ""
    """The digest of local code."""
    asked: str = ""
    """The provider that it stands in for; empty where it was itself asked for."""
    why: str = ""
    """Why it stands in."""

    @property
    def key(self) -> str:
        """``kind.name``."""
        return f"{self.kind}.{self.name}"

    @property
    def origin(self) -> str:
        """The distribution and its version, in words."""
        return self.distribution if self.distribution == REGISTERED else f"{self.distribution} {self.version}"

    def __str__(self) -> str:
        if self.distribution == FILE:
            return f"{self.kind} provider {self.name}"
        return f"{self.key} {self.origin}" if self.distribution == REGISTERED else f"{self.key} of {self.origin}"


@dataclass(frozen=True)
class Discovery:
    """What was found, and entry points that are not well formed (each costs itself alone)."""

    records: tuple[ProviderRecord, ...] = ()
    faults: tuple[Fault, ...] = ()


@dataclass
class _Distribution:
    """A distribution that has a word to say: where its metadata lies, and its `entry_points.txt`."""

    name: str
    version: str
    path: str
    entry_points: str


def discover(path: Sequence[str] | None = None) -> Discovery:
    """The providers of all distributions on `path` (`sys.path` where it is not given)."""
    records: list[ProviderRecord] = []
    faults: list[Fault] = []
    for distribution in _distributions(sys.path if path is None else path, finders=path is None):
        for key, target in _section(distribution.entry_points):
            name, value = _NAME.fullmatch(key), _TARGET.fullmatch(target)
            if name is None or value is None:
                faults.append(
                    Fault(
                        f"{distribution.name} {distribution.version}: entry point {key!r} = {target!r}",
                        'is not of the form "kind.name" = "package.module:Class"',
                    )
                )
                continue
            extras = tuple(extra.strip() for extra in (value["extras"] or "").split(",") if extra.strip())
            records.append(
                ProviderRecord(
                    kind=sys.intern(name["kind"]),
                    name=name["name"],
                    distribution=distribution.name,
                    version=distribution.version,
                    entry_point=value["target"],
                    path=distribution.path,
                    extras=extras,
                )
            )
    records.sort(key=lambda record: (record.kind, record.name, record.distribution, record.version, record.path))
    return Discovery(tuple(records), tuple(sorted(faults, key=str)))


def normalise(name: str) -> str:
    """The one spelling of a distribution's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _distributions(path: Iterable[str], *, finders: bool) -> Iterator[_Distribution]:
    seen: set[str] = set()
    folders: set[str] = set()
    for entry in path:
        folder = os.path.realpath(entry or ".")
        if folder in folders:  # lib64 is a link to lib
            continue
        folders.add(folder)
        found = list(_in_folder(folder, seen) if os.path.isdir(folder) else _by_importlib(seen, path=folder))
        # Two versions of one distribution in one folder (an upgrade that broke off) both count: that is a collision.
        seen.update(name for name, _ in found)
        yield from (distribution for _, distribution in found if distribution is not None)
    if finders and any(finder is not PathFinder and hasattr(finder, "find_distributions") for finder in sys.meta_path):
        yield from (distribution for _, distribution in _by_importlib(seen) if distribution is not None)


def _in_folder(folder: str, seen: set[str]) -> Iterator[tuple[str, _Distribution | None]]:
    """Distributions in a folder with their normalised names; None where they have no entry points of ours."""
    try:
        entries = sorted(os.listdir(folder))
    except OSError:  # a folder that may not be read offers nothing
        return
    for entry in entries:
        if not entry.endswith((".dist-info", ".egg-info")):
            continue
        stem = entry.rpartition(".")[0]
        name = stem.partition("-")[0].replace("_", "-").replace(".", "-").lower()
        if name in seen:
            continue
        metadata = f"{folder}/{entry}"
        try:
            with open(f"{metadata}/entry_points.txt", "rb") as file:
                content = file.read()
        except OSError:  # no entry points: most distributions
            yield name, None
            continue
        if b"apt.providers" not in content:
            yield name, None
            continue
        header = _header(metadata)
        fallback = stem.split("-")
        yield (
            name,
            _Distribution(
                name=normalise(header.get("name", fallback[0])),
                version=header.get("version", fallback[1] if len(fallback) > 1 else "0"),
                path=metadata,
                entry_points=content.decode("utf-8", "replace"),
            ),
        )


def _header(metadata: str) -> dict[str, str]:
    """`name` and `version` from the head of METADATA."""
    found: dict[str, str] = {}
    for file_name in ("METADATA", "PKG-INFO"):
        try:
            with open(f"{metadata}/{file_name}", encoding="utf-8", errors="replace") as file:
                for line in file:
                    key, colon, value = line.partition(":")
                    if not colon or len(found) == 2:
                        break
                    if key.lower() in ("name", "version"):
                        found[key.lower()] = value.strip()
        except OSError:
            continue
        break
    return found


def _by_importlib(seen: set[str], path: str | None = None) -> Iterator[tuple[str, _Distribution | None]]:
    """What only `importlib.metadata` can read: one zip file, or the finders that are not for folders."""
    from importlib.metadata import Distribution, DistributionFinder

    if path is not None:
        found = Distribution.discover(path=[path])
    else:
        context = DistributionFinder.Context()
        found = (
            distribution
            for finder in sys.meta_path
            if finder is not PathFinder and hasattr(finder, "find_distributions")
            for distribution in finder.find_distributions(context)
        )
    for distribution in found:
        if not (name := distribution.metadata["Name"]) or (name := normalise(name)) in seen:
            continue
        text = distribution.read_text("entry_points.txt") or ""
        where = str(getattr(distribution, "_path", path or ""))
        yield name, _Distribution(name, distribution.version, where, text) if GROUP in text else None


def _section(entry_points: str) -> Iterator[tuple[str, str]]:
    """The names and values of our group."""
    ours = False
    for line in map(str.strip, entry_points.splitlines()):
        if not line or line.startswith(("#", ";")):
            continue
        if line.startswith("["):
            ours = line == f"[{GROUP}]"
        elif ours:
            name, _, value = line.partition("=")
            yield name.strip(), value.strip()


def find_source(entry_point: str) -> Path | None:
    """The file or package folder that holds a provider's code, found without importing it.

    It is the outermost package with code of its own: what a provider does lies in its layers, not in its class alone.
    """
    places: Sequence[str] | None = None
    parts = entry_point.partition(":")[0].split(".")
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            if find is not None and (spec := find(name, places)) is not None:
                break
        else:
            return None
        if spec.origin and spec.has_location:
            origin = Path(spec.origin)
            return origin.parent if spec.submodule_search_locations is not None else origin
        if spec.submodule_search_locations is None:
            return None
        places = list(spec.submodule_search_locations)
    return None
