"""What a provider needs beside itself, held against what is installed, before anything of it is imported.

Two lists count: the distribution's own `Requires-Dist` (with the extras that the entry point names) and what
`Provider.get_dependencies` adds. Requirements are PEP 508 strings; markers and nested extras are honoured.

PyTorch that is absent is not a fault here: a provider is described, listed and validated without it, and nothing at
all can be built. PyTorch of a wrong version is.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion

from apt.core.discovery import ProviderRecord

ONLY_TO_BUILD = frozenset({"torch"})


@dataclass(frozen=True)
class Unmet:
    """A requirement that does not hold. `installed` is None where the distribution is missing altogether."""

    requirement: str
    distribution: str
    installed: str | None

    def __str__(self) -> str:
        have = "which is not installed" if self.installed is None else f"but {self.installed} is installed"
        return f"{self.requirement}, {have}"


def check_requirements(requirements: Iterable[str], extras: Iterable[str] = ()) -> list[Unmet]:
    """Those of `requirements` that do not hold here, each once; `extras` decide markers such as ``extra == "gpu"``.

    Raises `packaging.requirements.InvalidRequirement` for a string that is no requirement.
    """
    unmet: dict[str, Unmet] = {}
    _check(requirements, tuple(extras), unmet, set())
    return list(unmet.values())


def check_record(record: ProviderRecord) -> list[Unmet]:
    """Those requirements of a provider's distribution that do not hold, extras of its entry point included.

    Raises `packaging.requirements.InvalidRequirement` where the metadata is damaged.
    """
    if not record.path or record.sha256:
        return []
    requires = _requires(metadata.PathDistribution(Path(record.path)))
    if record.distribution == "apt-core":
        # What apt-core itself needs is no question any more while it runs; the extras of its providers are.
        requires = [requirement for requirement in requires if "extra" in requirement.partition(";")[2]]
    return check_requirements(requires, record.extras)


def install_line(unmet: Iterable[Unmet]) -> str:
    """The command that mends it."""
    return "pip install " + " ".join(shlex.quote(one.requirement) for one in unmet)


def _requires(distribution: metadata.Distribution) -> list[str]:
    """`Requires-Dist`; none where there is no metadata at all."""
    if distribution.read_text("METADATA") is None and distribution.read_text("PKG-INFO") is None:
        return []
    return distribution.requires or []


def _check(requirements: Iterable[str], extras: tuple[str, ...], unmet: dict[str, Unmet], seen: set[str]) -> None:
    for text in requirements:
        requirement = Requirement(text)
        if not _applies(requirement, extras):
            continue
        requirement.marker = None
        plain = str(requirement)
        if plain in seen:
            continue
        seen.add(plain)
        try:
            distribution = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            if canonicalize_name(requirement.name) not in ONLY_TO_BUILD:
                unmet[plain] = Unmet(plain, requirement.name, None)
            continue
        if not _satisfies(requirement, distribution):
            installed = f"{requirement.name} {distribution.metadata['Version'] or 'of unknown version'}"
            unmet[plain] = Unmet(plain, requirement.name, installed)
        elif requirement.extras:
            wanted = tuple(sorted(requirement.extras))
            of_extras = [
                line
                for line in _requires(distribution)
                if not _applies(Requirement(line), ()) and _applies(Requirement(line), wanted)
            ]
            _check(of_extras, wanted, unmet, seen)


def _applies(requirement: Requirement, extras: tuple[str, ...]) -> bool:
    if requirement.marker is None:
        return True
    return any(requirement.marker.evaluate({"extra": extra}) for extra in (*extras, ""))


def _satisfies(requirement: Requirement, distribution: metadata.Distribution) -> bool:
    version = distribution.metadata["Version"]
    if not version:
        return not requirement.specifier
    try:
        return requirement.specifier.contains(version, prereleases=True)
    except InvalidVersion:
        return False


__all__ = ["InvalidRequirement", "Unmet", "check_record", "check_requirements", "install_line"]
