"""What providers may not be used with: ``kind.name``, a whole kind, or ``capability:<word>``.

An exclusion is of the profile as a whole, in either direction: if A excludes B, it does not matter which stands first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from apt.core.provider import Provider
from apt.errors import Fault

_FORM = re.compile(r"capability:[\w-]+|[A-Za-z_]\w*(\.\S+)?")


@dataclass(frozen=True)
class Used:
    """A provider in use: where it stands, what it is, and what it may not be used with."""

    where: str
    kind: str
    name: str
    excludes: tuple[str, ...]
    capabilities: frozenset[str]

    @classmethod
    def of(cls, where: str, kind: str, name: str, provider: type[Provider], more: Iterable[str] = ()) -> Used:
        """A provider class in use, with exclusions stated when it was registered."""
        return cls(where, kind, name, (*provider.excludes, *more), provider.capabilities)


def check_form(excludes: Iterable[str], kind: str, kinds: Iterable[str]) -> tuple[str, ...]:
    """Exclusions as they are kept; a bare word that is no kind means a provider of the same kind.

    Raises ValueError for what is no exclusion.
    """
    known = set(kinds)
    kept: list[str] = []
    for exclusion in excludes:
        text = exclusion if exclusion.startswith("capability:") else exclusion.replace(":", ".", 1)
        if not _FORM.fullmatch(text):
            raise ValueError(f"{exclusion!r} is no exclusion; it is kind.name, a kind, or capability:<word>")
        bare = "." not in text and ":" not in text and text not in known
        kept.append(f"{kind}.{text}" if bare else text)
    return tuple(kept)


def find_conflicts(used: Iterable[Used], capabilities: Mapping[str, str] | None = None) -> list[Fault]:
    """Every pair that excludes one another, once.

    `capabilities` are words that the profile itself rules out, and why.
    """
    parts = list(used)
    faults: list[Fault] = []
    seen: set[frozenset[int]] = set()
    for i, one in enumerate(parts):
        for word, why in (capabilities or {}).items():
            if word in one.capabilities:
                faults.append(Fault(one.where, f"{one.kind}.{one.name} is {word}", why))
        for j, other in enumerate(parts):
            pair = frozenset((i, j))
            reason = next((text for text in one.excludes if i != j and _matches(text, other)), None)
            if reason is None or pair in seen:
                continue
            seen.add(pair)
            named = f"{other.kind}.{other.name}"
            what = f"{one.kind}.{one.name} excludes {reason}"
            what += f", which {named} has" if reason != named else ""
            what += f", used at {other.where}" if other.where != named else ""
            faults.append(Fault(one.where, what, "one of the two has to go"))
    return faults


def _matches(exclusion: str, used: Used) -> bool:
    if exclusion.startswith("capability:"):
        return exclusion.removeprefix("capability:") in used.capabilities
    return exclusion in (used.kind, f"{used.kind}.{used.name}")
