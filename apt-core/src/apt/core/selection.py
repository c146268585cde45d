"""`APT_DISABLE_PLUGINS` and `APT_ONLY_PLUGINS`: what may be loaded at all. What is disabled is never imported.

An entry is a distribution (``apt-moe``), a provider (``router.topk_default``) or a plugin (``moe``). `APT_ONLY_PLUGINS`
keeps what is named; a plugin keeps its whole distribution there, because its parts come with it, and apt-core's own
providers always stay. `APT_DISABLE_PLUGINS` takes away exactly what is named, and is the stronger of the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from apt.core.discovery import ProviderRecord, normalise
from apt.errors import UserError, nearest

DISABLE, ONLY = "APT_DISABLE_PLUGINS", "APT_ONLY_PLUGINS"


def select(records: Sequence[ProviderRecord], environment: Mapping[str, str]) -> tuple[ProviderRecord, ...]:
    """The records, with the reason in `disabled` where one of the two variables rules it out.

    Raises `UserError` where an entry matches nothing that is installed.
    """
    disable, only = _entries(environment, DISABLE), _entries(environment, ONLY)
    if not disable and only is None:
        return tuple(records)
    unknown = [
        _unknown(variable, entry, records)
        for variable, entries in ((DISABLE, disable), (ONLY, only))
        for entry in entries or ()
        if not any(_names(entry, record) for record in records)
    ]
    if unknown:
        raise UserError("\n".join(unknown))
    kept = {record.distribution for record in records for entry in only or () if _is_plugin(entry, record)}
    chosen: list[ProviderRecord] = []
    for record in records:
        reason = ""
        ours = record.distribution == "apt-core"
        if only is not None and not ours and record.distribution not in kept and not _any(only, record):
            reason = f"{ONLY} does not name it"
        if _any(disable or (), record):
            reason = f"{DISABLE} names it"
        chosen.append(replace(record, disabled=reason) if reason else record)
    return tuple(chosen)


def _entries(environment: Mapping[str, str], variable: str) -> tuple[str, ...] | None:
    """The entries of a variable; None where it is not set or empty."""
    return tuple(filter(None, map(str.strip, environment.get(variable, "").split(",")))) or None


def _any(entries: Iterable[str], record: ProviderRecord) -> bool:
    return any(_names(entry, record) for entry in entries)


def _names(entry: str, record: ProviderRecord) -> bool:
    return entry == record.key or normalise(entry) == record.distribution or _is_plugin(entry, record)


def _is_plugin(entry: str, record: ProviderRecord) -> bool:
    return record.kind == "plugin" and entry == record.name


def _unknown(variable: str, entry: str, records: Sequence[ProviderRecord]) -> str:
    known = {record.distribution for record in records} | {record.key for record in records}
    known |= {record.name for record in records if record.kind == "plugin"}
    hint = nearest(entry, sorted(known)) or "it takes distributions, kind.name, and plugins' names"
    return f"{variable}: {entry!r} matches nothing that is installed; {hint}"
