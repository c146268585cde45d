"""What was asked for and what is used: a provider's record read as an answer, a profile's words as a question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic_core import PydanticCustomError

from apt.core.discovery import ProviderRecord
from apt.core.loading import registered
from apt.core.provider import Provider

if TYPE_CHECKING:
    from apt.core.config import Choice


@dataclass(frozen=True)
class Resolution:
    """What was asked for and what is used; `why` is empty where the two are the same."""

    kind: str
    asked: str
    used: str
    why: str
    distribution: str
    version: str
    provider: Provider
    where: str = ""
    """The dotted path in the profile; empty where no profile asked."""

    @classmethod
    def of(cls, provider: Provider, where: str = "") -> Resolution:
        """What a provider's own record says."""
        record = record_of(provider)
        asked = record.asked or record.name
        return cls(record.kind, asked, record.name, record.why, record.distribution, record.version, provider, where)

    def to_dict(self) -> dict[str, str]:
        """Everything but the provider itself, for the run's record."""
        words = ("where", "kind", "asked", "used", "why", "distribution", "version")
        return {word: getattr(self, word) for word in words}


def record_of(provider: Provider) -> ProviderRecord:
    """Where a provider came from; one that no registry made is described by its class."""
    if provider._record is not None:
        return provider._record
    found = type(provider)
    return registered(found.kind, provider.get_name(), f"{found.__module__}:{found.__qualname__}")


def describe(provider: Provider) -> str:
    """Which it is, and where it came from: ``router.topk_default (apt-moe 0.1.0)``."""
    record = record_of(provider)
    return f"{record.key} ({record.distribution} {record.version})"


def read_choice(kind: str, value: object) -> Choice:
    """A nested provider as YAML gives it: its name, or ``{provider: name, fallback: [...], **options}``.

    Raises `PydanticCustomError` for anything else, so that it is reported among the other faults of the options.
    """
    from apt.core.config import Choice

    if isinstance(value, Choice):
        return value
    if isinstance(value, str):
        return Choice(provider=value)
    if isinstance(value, Mapping) and isinstance(value.get("provider"), str):
        fallback = value.get("fallback", ())
        names = [fallback] if isinstance(fallback, str) else fallback
        if isinstance(names, Sequence) and all(isinstance(name, str) for name in names):
            options = {key: each for key, each in value.items() if key not in ("provider", "fallback")}
            # Not validated: from Python an option may be a provider, which is no JSON value.
            return Choice.model_construct(provider=value["provider"], fallback=tuple(names), options=options)
    raise PydanticCustomError(
        "provider_form",
        "must be the name of a provider of kind {kind}, or {open}provider: name, option: value, ...{close}",
        {"kind": kind, "open": "{", "close": "}"},
    )
