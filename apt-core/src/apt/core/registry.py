"""The registry: which provider builds this part? One of many, by kind and name, never by chance.

A provider is known at three levels. Its *metadata* is read from what is installed, and nothing is imported (`discovery`).
Its *class*, a pydantic model that needs no PyTorch, is imported when it is asked for (`loading`). Its *part* is built by
the class. A package that is broken costs its own providers alone.

`get` may fall back to the kind's default, with a warning that says why; `resolve` serves profiles, and follows only the
fallbacks that a profile states.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from apt.core.discovery import Discovery, ProviderRecord, discover
from apt.core.exclusions import Used, check_form, find_conflicts
from apt.core.loading import check_class, load_object, registered
from apt.core.local import LocalCode, is_local, read_local, run_local
from apt.core.options import PROVIDER_FAULT, below, canonical, explain
from apt.core.provider import Provider
from apt.core.providers import INTERFACES
from apt.core.selection import select
from apt.errors import (
    Fault,
    OptionsError,
    ProviderBrokenError,
    ProviderCollisionError,
    ProviderDisabledError,
    ProviderError,
    ProviderFallbackWarning,
    ProviderNotFoundError,
    nearest,
)

if TYPE_CHECKING:
    from apt.core.config import Choice

P = TypeVar("P", bound=Provider)
C = TypeVar("C", bound=type[Provider])

DEFAULTS = {
    "attention": "sdpa",
    "ffn": "default",
    "router": "topk_default",
    "align": "bistate_default",
    "data": "stdlib",
    "tokenizer": "byte",
}
"""What `get` takes for a kind without a name, where it is installed and `set_default` says nothing else."""

COMES_WITH = {
    "attention.tva_default": "apt-attention-tva",
    "attention.autopoietic": "apt-attention-tva",
    "ffn.moe": "apt-moe",
    "router.topk_default": "apt-moe",
    "plugin.moe": "apt-moe",
    "align.bistate_default": "apt-align",
    "plugin.align": "apt-align",
    "retrieval.cosine": "apt-rag",
    "plugin.rag": "apt-rag",
}
"""Providers that are known to exist, and their distributions: for the line that installs them."""

COMMAND = "command"
"""The kind of entry points that are not providers but commands of `apt-core`."""


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
        return cls(
            record.kind, asked, record.name, record.why, record.distribution, record.version, provider, where
        )

    def to_dict(self) -> dict[str, str]:
        """Everything but the provider itself, for the run's record."""
        words = ("where", "kind", "asked", "used", "why", "distribution", "version")
        return {word: getattr(self, word) for word in words}


class Registry:
    """Kinds, names, and the providers behind them.

    ``Registry()`` knows what is registered with it and nothing else; ``Registry(discover)`` knows what is installed too.
    All methods may be called from several threads.
    """

    def __init__(self, find: Callable[[], Discovery] | None = None) -> None:
        self._find = find
        self._lock = threading.RLock()
        self._found = find is None
        self._faults: tuple[Fault, ...] = ()
        self._records: dict[str, dict[str, tuple[ProviderRecord, ...]]] = {}
        self._excludes: dict[tuple[str, str], tuple[str, ...]] = {}
        self._registered: dict[str, dict[str, tuple[ProviderRecord, ...]]] = {}
        self._defaults: dict[str, str] = {}
        self._hooks: dict[str, list[Callable[[Provider], object]]] = {}
        self._classes: dict[tuple[str, str], type[Provider]] = {}
        self._failures: dict[tuple[str, str], str] = {}
        self._ready: dict[tuple[str, str | None, str | None], Provider] = {}
        self._local: LocalCode | None = None

    # What is known without importing anything

    def list_providers(self, kind: str | None = None) -> dict[str, list[str]]:
        """Kind -> the names that may be asked for: by priority where the class is loaded, then by name.

        Nothing is imported; a class that is not loaded counts as priority 0. What is disabled is left out.
        """
        known = self._known()
        kinds = sorted(known.keys() - {COMMAND}) if kind is None else [kind] if kind in known else []
        return {each: self._names(each) for each in kinds if self._names(each)}

    def records(self, kind: str | None = None) -> list[ProviderRecord]:
        """All claims, disabled and colliding ones too, in order of kind, name, distribution and version."""
        known = self._known()
        kinds = sorted(known) if kind is None else [kind]
        return [record for each in kinds for name in sorted(known.get(each, {})) for record in known[each][name]]

    def faults(self) -> tuple[Fault, ...]:
        """Entry points that are not well formed."""
        self._known()
        return self._faults

    def get_info(self, kind: str, name: str) -> dict[str, object]:
        """What is known of a provider; nothing is imported for it.

        Raises `ProviderNotFoundError` where nobody offers it.
        """
        claims = self._claims(kind, name)
        record, provider = claims[0], self._classes.get((kind, name))
        info: dict[str, object] = {
            "kind": kind,
            "name": name,
            "distribution": record.distribution,
            "version": record.version,
            "entry_point": record.entry_point,
            "path": record.path,
            "default": self.get_default(kind) == name,
            "loaded": provider is not None,
            "disabled": record.disabled,
            "claimed_by": [claim.origin for claim in claims],
            "broken": self._failures.get((kind, name), ""),
        }
        if provider is not None:
            info |= {
                "description": (provider.__doc__ or "").strip().partition("\n")[0],
                "options": list(provider.model_fields),
                "dependencies": provider.get_dependencies(),
                "priority": provider.get_priority(),
                "excludes": [*provider.excludes, *self._excludes.get((kind, name), ())],
                "capabilities": sorted(provider.capabilities),
                "scheduled": dict(provider.scheduled),
                "switched_by": provider.switched_by,
            }
        return info

    def get_default(self, kind: str) -> str | None:
        """The default of a kind: what was set, else what APT prefers, else the only one there is."""
        names = self._known().get(kind, {})
        if kind in self._defaults:
            return self._defaults[kind]
        if DEFAULTS.get(kind) in names:
            return DEFAULTS[kind]
        return next(iter(names)) if len(names) == 1 else None

    def set_default(self, kind: str, name: str) -> None:
        """Let `name` be what `get` takes for this kind. Profiles always name what they use."""
        self._claims(kind, name)
        with self._lock:
            self._defaults[kind] = name

    # What is imported on demand

    def load_object(self, kind: str, name: str) -> object:
        """Import whatever the entry point names, be it a provider or not.

        Raises `ProviderError`: nobody offers it, it is disabled, two distributions claim it, a requirement is missing, or
        its import fails. A failed import is not tried again before `clear_cache`.
        """
        record = self._record(kind, name)
        if (kind, name) in self._failures:
            raise ProviderBrokenError(kind, name, self._failures[kind, name])
        try:
            return load_object(record)
        except ProviderBrokenError as error:
            with self._lock:
                self._failures[kind, name] = str(error)
            raise

    def load(self, kind: str, name: str) -> type[Provider]:
        """The class of a provider, imported and checked; PyTorch is not needed. Raises `ProviderError`."""
        return self._load(kind, name)[1]

    def get(
        self, kind: str, name: str | None = None, config: Mapping[str, object] | None = None, fallback: bool = True
    ) -> Provider:
        """The provider of this kind and name with these options: one instance for each kind, name and options.

        Without a name, the kind's default. Where the provider cannot be had and `fallback` is true, the kind's default
        with its default options stands in, under a `ProviderFallbackWarning`; a name that two distributions claim is
        an error all the same. Raises `ProviderError`.
        """
        options = canonical(config) if config else None
        provider = self._ready.get((kind, name, options))
        if provider is not None:
            return provider
        default = self.get_default(kind)
        if name is None:
            if default is None:
                raise self._not_found(kind, None)
            name, fallback = default, False
        try:
            return self._get(kind, name, config, options)
        except ProviderCollisionError:
            raise
        except ProviderError as error:
            if not fallback or default is None or default == name:
                raise
            try:
                provider = self._get(kind, default, None, None)
            except ProviderError as second:
                error.add_note(f"its stand-in, the default {kind}.{default}, cannot be had either: {second}")
                raise error from second
            message = f"{kind}.{name} was asked for, {kind}.{default} is used with its default options: {error}"
            warnings.warn(message, ProviderFallbackWarning, stacklevel=2)
            return provider

    def resolve(self, kind: str, choice: Choice) -> Resolution:
        """The provider that a profile chooses, or the first of its stated fallbacks that can be had.

        A stand-in is given those of the options that it has too; `why` names the others. Raises the first provider's
        `ProviderError` where none can be had. Options that are refused and a name that two distributions claim are
        mistakes to mend, not reasons for a stand-in.
        """
        return self._resolve(kind, choice, lambda name, options: self._get(kind, name, options, canonical(options)))

    def resolve_new(self, kind: str, choice: Choice) -> Provider:
        """As `resolve`, but an instance of its own, whose record says what it stands in for: for nested providers."""
        found = self._resolve(kind, choice, lambda name, options: self._make(kind, name, options))
        provider = found.provider
        record = record_of(provider)
        if found.why:
            provider._record = replace(record, asked=found.asked, why=found.why)
        self._call_hooks(provider)
        return provider

    # What is added by hand

    def register(
        self,
        kind: str,
        name: str,
        provider: type[Provider] | str,
        default: bool = False,
        excludes: Iterable[str] | None = None,
        override: bool = False,
    ) -> None:
        """Offer a provider: its class, or ``"package.module:Class"`` to import it only when it is asked for.

        `excludes` adds to the class's own: ``kind.name``, a kind, ``capability:<word>``, or the name of a provider of the
        same kind. Raises `ProviderCollisionError` for a name that is taken, unless `override`.
        """
        target = provider if isinstance(provider, str) else f"{provider.__module__}:{provider.__qualname__}"
        record = registered(kind, name, target)
        if not isinstance(provider, str):
            check_class(record, provider)
        with self._lock:
            known = self._known()
            taken = known.get(kind, {}).get(name, ())
            if taken and not override and all(claim.entry_point != target for claim in taken):
                raise ProviderCollisionError(
                    kind, name, f"{taken[0]} is there already; override=True replaces it with {target}"
                )
            kinds = {*known, *INTERFACES}
            self._excludes[kind, name] = check_form(excludes or (), kind, kinds)
            for table in (self._registered, self._records):
                table.setdefault(kind, {})[name] = (record,)
            self.clear_cache(kind, name)
            if not isinstance(provider, str):
                self._classes[kind, name] = provider
            if default:
                self._defaults[kind] = name

    def register_init_hook(self, kind: str, callback: Callable[[Provider], object]) -> None:
        """Call `callback` with every instance of this kind after it is made; what it raises is not swallowed."""
        with self._lock:
            self._hooks.setdefault(kind, []).append(callback)

    def allow_local_code(self, leave: LocalCode | None) -> None:
        """Say which provider code in files may be run (see `apt.core.local`); None forbids it, which is the beginning."""
        with self._lock:
            self._local = leave
            self.clear_cache()

    # What must not stand together, and what is forgotten

    def check_conflicts(self, providers: Iterable[Provider | str] | None = None) -> list[Fault]:
        """Every exclusion that these providers violate, once each; by default, those of all instances that were made.

        Providers are instances or ``"kind.name"``; the classes of named ones are imported.
        """
        if providers is None:
            providers = dict(self._ready).values()
        return find_conflicts([self.used(f"{provider}", provider) if isinstance(provider, str)
                               else self.used(record_of(provider).key, provider) for provider in _unique(providers)])

    def used(self, where: str, provider: Provider | str) -> Used:
        """A provider in use at `where`, with all that it excludes."""
        if isinstance(provider, Provider):
            record = record_of(provider)
            kind, name, found = record.kind, record.name, type(provider)
        else:
            kind, _, name = provider.replace(":", ".", 1).partition(".")
            found = self.load(kind, name)
        return Used.of(where, kind, name, found, self._excludes.get((kind, name), ()))

    def clear_cache(self, kind: str | None = None, name: str | None = None) -> None:
        """Forget instances and failed imports, of all kinds, of one kind, or of one provider; nothing is unregistered."""
        with self._lock:
            for key in [key for key in self._ready if kind in (None, key[0]) and name in (None, key[1])]:
                del self._ready[key]
            for failed in [key for key in self._failures if kind in (None, key[0]) and name in (None, key[1])]:
                del self._failures[failed]

    def refresh(self) -> None:
        """Read again what is installed; what was registered by hand stays."""
        with self._lock:
            self._found = self._find is None
            self._classes = {
                key: provider for key, provider in self._classes.items() if key[1] in self._registered.get(key[0], {})
            }
            self.clear_cache()

    # How it works

    def _known(self) -> dict[str, dict[str, tuple[ProviderRecord, ...]]]:
        if self._found:
            return self._records
        with self._lock:
            if not self._found and self._find is not None:
                found = self._find()
                records: dict[str, dict[str, tuple[ProviderRecord, ...]]] = {}
                for record in select(found.records, os.environ):
                    names = records.setdefault(record.kind, {})
                    names[record.name] = (*names.get(record.name, ()), record)
                for kind, registered_names in self._registered.items():
                    records.setdefault(kind, {}).update(registered_names)
                self._records, self._faults, self._found = records, found.faults, True
        return self._records

    def _names(self, kind: str) -> list[str]:
        def order(name: str) -> tuple[int, str]:
            provider = self._classes.get((kind, name))
            return (-provider.get_priority() if provider else 0, name)

        known = self._known().get(kind, {})
        return sorted((name for name, claims in known.items() if not all(c.disabled for c in claims)), key=order)

    def _claims(self, kind: str, name: str) -> tuple[ProviderRecord, ...]:
        claims = self._known().get(kind, {}).get(name)
        if claims is None:
            raise self._not_found(kind, name)
        return claims

    def _record(self, kind: str, name: str) -> ProviderRecord:
        """The one claim on a name that counts."""
        claims = self._claims(kind, name)
        able = [claim for claim in claims if not claim.disabled]
        if not able:
            raise ProviderDisabledError(kind, name, f"{claims[0]} is disabled: {claims[0].disabled}")
        if len(able) > 1:
            origins = " and ".join(claim.origin for claim in able)
            others = ", ".join(dict.fromkeys(f"pip uninstall {claim.distribution}" for claim in able))
            message = f"{kind}.{name} is claimed by {origins}; keep one ({others}), or name one in APT_DISABLE_PLUGINS"
            raise ProviderCollisionError(kind, name, message)
        return able[0]

    def _not_found(self, kind: str, name: str | None) -> ProviderNotFoundError:
        names = self._names(kind)
        installed = f"installed: {', '.join(names)}" if names else f"no {kind} provider is installed"
        if name is None:
            return ProviderNotFoundError(kind, "", f"there is no default {kind} provider; name one; {installed}")
        message = f"no {kind} provider {name!r} is installed"
        if not names and kind not in INTERFACES and (hint := nearest(kind, {*INTERFACES, *self._known()})):
            return ProviderNotFoundError(kind, name, f"{message}; no kind is called {kind!r}; {hint}")
        known = {key.partition(".")[2] for key in COMES_WITH if key.startswith(f"{kind}.")}
        if name in known:
            distribution = COMES_WITH[f"{kind}.{name}"]
            return ProviderNotFoundError(
                kind, name, f"{message}; it comes with {distribution}: pip install {distribution}"
            )
        hint = nearest(name, {*names, *known})
        return ProviderNotFoundError(kind, name, "; ".join(filter(None, (message, hint, installed))))

    def _load(self, kind: str, name: str) -> tuple[ProviderRecord, type[Provider]]:
        if is_local(name):
            record, code = read_local(kind, name, self._local)
            return record, check_class(record, run_local(record, code))
        record = self._record(kind, name)
        provider = self._classes.get((kind, name))
        if provider is None:
            found = self.load_object(kind, name)
            try:
                provider = check_class(record, found)
            except ProviderBrokenError as error:
                with self._lock:
                    self._failures[kind, name] = str(error)
                raise
            with self._lock:
                self._classes[kind, name] = provider
        return record, provider

    def _make(self, kind: str, name: str, options: Mapping[str, object]) -> Provider:
        record, found = self._load(kind, name)
        try:
            provider = found.model_validate(dict(options), context={"registry": self})
        except ValidationError as error:
            raise OptionsError(kind, name, [below(f"{kind}.{name}", fault) for fault in explain(error, found)]) from error
        provider._record = record
        return provider

    def _get(self, kind: str, name: str, options: Mapping[str, object] | None, key: str | None) -> Provider:
        key = None if key == "{}" else key
        provider = None if is_local(name) else self._ready.get((kind, name, key))
        if provider is None:
            made = self._make(kind, name, options or {})
            # Imports and validation ran without the lock, so that another thread's import cannot wait for this one.
            with self._lock:
                provider = self._ready.get((kind, name, key))
                if provider is None or record_of(provider) != record_of(made):
                    self._call_hooks(made)
                    self._ready[kind, name, key] = provider = made
        return provider

    def _call_hooks(self, provider: Provider) -> None:
        for callback in tuple(self._hooks.get(record_of(provider).kind, ())):
            callback(provider)

    def _resolve(
        self, kind: str, choice: Choice, make: Callable[[str, Mapping[str, object]], Provider]
    ) -> Resolution:
        try:
            return Resolution.of(make(choice.provider, choice.options))
        except (OptionsError, ProviderCollisionError):
            raise
        except ProviderError as error:
            reasons = [error]
        for name in choice.fallback:
            try:
                fields = self.load(kind, name).model_fields
                options = {key: value for key, value in choice.options.items() if key in fields}
                provider = make(name, options)
            except (OptionsError, ProviderCollisionError):
                raise
            except ProviderError as error:
                reasons.append(error)
                continue
            why = "; ".join(map(str, reasons))
            if lost := ", ".join(key for key in choice.options if key not in fields):
                why += f"; {name} has no option {lost}"
            return replace(Resolution.of(provider), asked=choice.provider, why=why)
        message = "; ".join(map(str, reasons))
        raise type(reasons[0])(kind, choice.provider, message)


def record_of(provider: Provider) -> ProviderRecord:
    """Where a provider came from; one that no registry made is described by its class."""
    if provider._record is not None:
        return provider._record
    found = type(provider)
    return registered(found.kind, provider.get_name(), f"{found.__module__}:{found.__qualname__}")


def resolve_slot(interface: type[P], value: object, context: object) -> P:
    """The nested provider that an option of type ``Slot[interface]`` means.

    `value` is a provider, its name, or ``{provider: name, fallback: [...], **options}``; `context` is pydantic's and may
    hold the registry. Raises `PydanticCustomError`, so that it is reported among the other faults of the options.
    """
    if isinstance(value, interface):
        return value
    used = context.get("registry") if isinstance(context, Mapping) else None
    here = used if isinstance(used, Registry) else registry
    try:
        provider = here.resolve_new(interface.kind, _choice(interface.kind, value))
        if not isinstance(provider, interface):
            raise ProviderBrokenError(interface.kind, provider.get_name(), f"is not a {interface.__qualname__}")
    except ProviderError as error:
        raise PydanticCustomError(PROVIDER_FAULT, "{message}", {"message": str(error), "error": error}) from error
    return provider


def _choice(kind: str, value: object) -> Choice:
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
            return Choice(provider=value["provider"], fallback=tuple(names), options=options)
    raise PydanticCustomError(
        "provider_form",
        "must be the name of a provider of kind {kind}, or {{provider: name, option: value, ...}}",
        {"kind": kind},
    )


def _unique(providers: Iterable[Provider | str]) -> list[Provider | str]:
    seen: dict[tuple[str, int | str], Provider | str] = {}
    for provider in providers:
        key = provider.replace(":", ".", 1) if isinstance(provider, str) else record_of(provider).key
        seen.setdefault(("", key), provider)
    return list(seen.values())


registry = Registry(discover)
"""The registry of this process: everything that is installed, and what is registered by hand."""

get_provider = registry.get


def register_provider(
    kind: str, name: str, default: bool = False, excludes: Iterable[str] | None = None, override: bool = False
) -> Callable[[C], C]:
    """Register the decorated class with the registry of this process."""

    def register(provider: C) -> C:
        registry.register(kind, name, provider, default=default, excludes=excludes, override=override)
        return provider

    return register
