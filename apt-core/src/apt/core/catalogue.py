"""Who claims which name: the first level of the registry, known from metadata, with nothing imported.

What is disabled by the environment, claimed twice or not there at all is answered here, by name.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from apt.core.discovery import Discovery, ProviderRecord
from apt.core.providers import INTERFACES
from apt.core.selection import select
from apt.errors import Fault, ProviderCollisionError, ProviderDisabledError, ProviderNotFoundError, nearest

DEFAULTS = {
    "attention": "sdpa",
    "ffn": "default",
    "router": "topk_default",
    "align": "bistate_default",
    "data": "stdlib",
    "tokenizer": "byte",
}
"""What stands for a kind without a name, where it is installed and nothing else was set."""

COMES_WITH = {
    "attention.tva_default": "apt-attention-tva",
    "attention.autopoietic": "apt-attention-tva",
    "command.convert": "apt-attention-tva",
    "ffn.moe": "apt-moe",
    "router.topk_default": "apt-moe",
    "router.switch": "apt-moe",
    "router.noisy_topk": "apt-moe",
    "router.sigmoid_bias": "apt-moe",
    "router.expert_choice": "apt-moe",
    "router.hash": "apt-moe",
    "router.random": "apt-moe",
    "command.moe": "apt-moe",
    "plugin.moe": "apt-moe",
    "plugin.routing": "apt-moe",
    "align.bistate_default": "apt-align",
    "align.mean_teacher": "apt-align",
    "align.rdrop": "apt-align",
    "plugin.align": "apt-align",
    "retrieval.cosine": "apt-rag",
    "plugin.rag": "apt-rag",
}
"""Providers and commands that are known to exist, and their distributions: for the line that installs them."""

COMMAND = "command"
"""The kind of entry points that are not providers but commands of `apt-core`."""

Claims = dict[str, dict[str, tuple[ProviderRecord, ...]]]


class Catalogue:
    """Kind -> name -> the records that claim it. What was registered by hand hides what is installed.

    The tables are replaced, never changed, so that readers need no lock.
    """

    def __init__(self, find: Callable[[], Discovery] | None = None) -> None:
        self._find = find
        self._lock = threading.RLock()
        self._claims: Claims | None = None
        self._registered: Claims = {}
        self._defaults: dict[str, str] = {}
        self._faults: tuple[Fault, ...] = ()

    def claims(self) -> Claims:
        """Everything that is known; the environment is read at the first call.

        Raises `UserError` where APT_DISABLE_PLUGINS or APT_ONLY_PLUGINS names what is not installed.
        """
        known = self._claims
        if known is None:
            with self._lock:
                known = self._claims
                if known is None:
                    found = self._find() if self._find is not None else Discovery()
                    known = {}
                    for record in select(found.records, os.environ) if self._find is not None else ():
                        names = known.setdefault(record.kind, {})
                        names[record.name] = (*names.get(record.name, ()), record)
                    for kind, names in self._registered.items():
                        known.setdefault(kind, {}).update(names)
                    self._claims, self._faults = known, found.faults
        return known

    def faults(self) -> tuple[Fault, ...]:
        """Entry points that are not well formed."""
        self.claims()
        return self._faults

    def names(self, kind: str) -> list[str]:
        """The names of a kind that may be asked for, sorted; what is disabled is left out."""
        known = self.claims().get(kind, {})
        return sorted(name for name, claims in known.items() if not all(claim.disabled for claim in claims))

    def get_claims(self, kind: str, name: str) -> tuple[ProviderRecord, ...]:
        """All claims on a name. Raises `ProviderNotFoundError` where there is none."""
        claims = self.claims().get(kind, {}).get(name)
        if claims is None:
            raise self.not_found(kind, name)
        return claims

    def get_record(self, kind: str, name: str) -> ProviderRecord:
        """The one claim that counts.

        Raises `ProviderNotFoundError`, `ProviderDisabledError`, or `ProviderCollisionError`: two claims have no winner.
        """
        claims = self.get_claims(kind, name)
        able = [claim for claim in claims if not claim.disabled]
        if not able:
            raise ProviderDisabledError(kind, name, f"{claims[0]} is disabled: {claims[0].disabled}")
        if len(able) > 1:
            raise ProviderCollisionError(kind, name, describe_collision(able))
        return able[0]

    def is_registered(self, kind: str, name: str) -> bool:
        """Whether a name was registered by hand."""
        return name in self._registered.get(kind, {})

    def add(self, record: ProviderRecord, *, override: bool) -> None:
        """Add what is registered by hand. Raises `ProviderCollisionError` where the name is taken by something else."""
        kind, name = record.kind, record.name
        with self._lock:
            known = self.claims()
            taken = known.get(kind, {}).get(name, ())
            if taken and not override and all(claim.entry_point != record.entry_point for claim in taken):
                message = f"{taken[0]} is there already; override=True replaces it with {record.entry_point}"
                raise ProviderCollisionError(kind, name, message)
            self._registered = {**self._registered, kind: {**self._registered.get(kind, {}), name: (record,)}}
            self._claims = {**known, kind: {**known.get(kind, {}), name: (record,)}}

    def refresh(self) -> None:
        """Read again what is installed; what was registered by hand stays."""
        with self._lock:
            self._claims = None

    def get_default(self, kind: str) -> str | None:
        """The default of a kind: what was set, else what APT prefers, else the only one there is."""
        names = self.claims().get(kind, {})
        if kind in self._defaults:
            return self._defaults[kind]
        if DEFAULTS.get(kind) in names:
            return DEFAULTS[kind]
        return next(iter(names)) if len(names) == 1 else None

    def set_default(self, kind: str, name: str) -> None:
        """Set the default of a kind. Raises `ProviderNotFoundError`."""
        self.get_claims(kind, name)
        with self._lock:
            self._defaults = {**self._defaults, kind: name}

    def not_found(self, kind: str, name: str | None) -> ProviderNotFoundError:
        """The error that says what is there, what was probably meant, or what to install."""
        names = self.names(kind)
        installed = f"installed: {', '.join(names)}" if names else f"no {kind} provider is installed"
        if name is None:
            return ProviderNotFoundError(kind, "", f"there is no default {kind} provider; name one; {installed}")
        message = f"no {kind if kind == COMMAND else f'{kind} provider'} {name!r} is installed"
        if distribution := COMES_WITH.get(f"{kind}.{name}"):
            message += f"; it comes with {distribution}: pip install {distribution}"
            return ProviderNotFoundError(kind, name, message)
        if kind not in INTERFACES and not names:
            message = f"there is no kind of provider {kind!r}"
            hint, installed = nearest(kind, {*INTERFACES, *self.claims()}), f"kinds: {', '.join(INTERFACES)}"
        else:
            known = {key.partition(".")[2] for key in COMES_WITH if key.startswith(f"{kind}.")}
            hint = nearest(name, sorted({*names, *known}))
        return ProviderNotFoundError(kind, name, "; ".join((message, " ".join(filter(None, (hint, installed))))))


def describe_collision(claims: list[ProviderRecord]) -> str:
    """What two distributions claim at once, and what mends it."""
    origins = " and ".join(claim.origin for claim in claims)
    distributions = list(dict.fromkeys(claim.distribution for claim in claims))
    if len(distributions) == 1:
        mend = f"install it anew: pip install --force-reinstall {distributions[0]}"
    else:
        # apt-core itself is not what has to go.
        remove = " or ".join(f"pip uninstall {each}" for each in distributions if each != "apt-core")
        mend = f"keep one ({remove}), or name one distribution in APT_DISABLE_PLUGINS"
    return f"{claims[0].key} is claimed by {origins}; {mend}"
