"""The registry: which provider builds this part? One of many, by kind and name, never by chance.

A provider is known at three levels. Its *metadata* is read from what is installed, and nothing is imported
(`catalogue`). Its *class*, a pydantic model that needs no PyTorch, is imported when it is asked for (`loading`). Its
*part* is built by the class. A package that is broken costs its own providers alone.

`get` may fall back to the kind's default, with a warning that says why; `resolve` serves profiles, and follows only the
fallbacks that a profile states.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from apt.core.catalogue import COMMAND, Catalogue
from apt.core.discovery import Discovery, ProviderRecord, discover
from apt.core.exclusions import Used, check_form, find_conflicts
from apt.core.loading import check_class, check_dependencies, load_object, registered
from apt.core.local import LocalCode, is_local, read_local, run_local
from apt.core.options import PROVIDER_FAULT, below, canonical, explain, mistyped
from apt.core.provider import Provider
from apt.core.providers import INTERFACES
from apt.core.resolution import Resolution, read_choice, record_of
from apt.errors import (
    AptError,
    Fault,
    OptionsError,
    ProviderBrokenError,
    ProviderCollisionError,
    ProviderError,
    ProviderFallbackWarning,
)

if TYPE_CHECKING:
    from apt.core.config import Choice

P = TypeVar("P", bound=Provider)
C = TypeVar("C", bound=type[Provider])


class Registry:
    """Kinds, names, and the providers behind them.

    ``Registry()`` knows what is registered with it, ``Registry(discover)`` what is installed too.
    All methods may be called from several threads.
    """

    def __init__(self, find: Callable[[], Discovery] | None = None) -> None:
        self._catalogue = Catalogue(find)
        self._lock = threading.RLock()
        self._excludes: dict[tuple[str, str], tuple[str, ...]] = {}
        self._hooks: dict[str, tuple[Callable[[Provider], object], ...]] = {}
        self._classes: dict[tuple[str, str], type[Provider]] = {}
        self._failures: dict[tuple[str, str], str] = {}
        self._ready: dict[tuple[str, str | None, str | None], Provider] = {}
        self._ready_local: dict[tuple[str, str | None, str | None], Provider] = {}
        self._leave: LocalCode | None = None

    def list_providers(self, kind: str | None = None) -> dict[str, list[str]]:
        """Kind -> the names that may be asked for: by priority where the class is loaded, then by name.

        Nothing is imported; a class that is not loaded counts as priority 0. What is disabled is left out.
        """
        kinds = sorted(self._catalogue.claims().keys() - {COMMAND}) if kind is None else [kind]
        listing = {
            each: sorted(self._catalogue.names(each), key=lambda name: self._order(each, name)) for each in kinds
        }
        return {each: names for each, names in listing.items() if names}

    def records(self, kind: str | None = None) -> list[ProviderRecord]:
        """All claims, disabled and colliding ones too, in order of kind, name, distribution and version."""
        known = self._catalogue.claims()
        kinds = sorted(known) if kind is None else [kind]
        return [record for each in kinds for name in sorted(known.get(each, {})) for record in known[each][name]]

    def faults(self) -> tuple[Fault, ...]:
        """Entry points that are not well formed."""
        return self._catalogue.faults()

    def get_info(self, kind: str, name: str) -> dict[str, object]:
        """What is known of a provider; nothing is imported for it.

        Raises `ProviderNotFoundError` where nobody offers it.
        """
        claims = self._catalogue.get_claims(kind, name)
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
        return self._catalogue.get_default(kind)

    def set_default(self, kind: str, name: str) -> None:
        """Let `name` be what `get` takes for this kind. Profiles always name what they use."""
        self._catalogue.set_default(kind, name)

    def load_object(self, kind: str, name: str) -> object:
        """Import whatever the entry point names, be it a provider or not.

        Raises `ProviderError`: nobody offers it, it is disabled, two distributions claim it, a requirement is missing,
        or its import fails. A failed import is not tried again before `clear_cache`.
        """
        record = self._catalogue.get_record(kind, name)
        if failure := self._failures.get((kind, name)):
            raise ProviderBrokenError(kind, name, failure)
        with self._remembering_failure():
            return load_object(record)

    def load(self, kind: str, name: str) -> type[Provider]:
        """The class of a provider, imported and checked, to be described. PyTorch is not needed.

        What `Provider.get_dependencies` adds need not be installed yet. Raises `ProviderError`.
        """
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
                raise self._catalogue.not_found(kind, None)
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
        if found.why:
            found.provider._record = replace(record_of(found.provider), asked=found.asked, why=found.why)
        self._call_hooks(found.provider)
        return found.provider

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

        `excludes` adds to the class's own: ``kind.name``, a kind, ``capability:<word>``, or the name of a provider of
        the same kind. Raises `ProviderCollisionError` for a name that is taken, unless `override`.
        """
        target = provider if isinstance(provider, str) else f"{provider.__module__}:{provider.__qualname__}"
        record = registered(kind, name, target)
        if not isinstance(provider, str):
            check_class(record, provider)
        more = check_form(excludes or (), kind, {*self._catalogue.claims(), *INTERFACES})
        with self._lock:
            self._catalogue.add(record, override=override)
            self.clear_cache(kind, name)
            self._excludes[kind, name] = more
            self._classes.pop((kind, name), None)
            if not isinstance(provider, str):
                self._classes[kind, name] = provider
            if default:
                self._catalogue.set_default(kind, name)

    def register_init_hook(self, kind: str, callback: Callable[[Provider], object]) -> None:
        """Call `callback` with every instance of this kind after it is made; what it raises is not swallowed."""
        with self._lock:
            self._hooks[kind] = (*self._hooks.get(kind, ()), callback)

    def allow_local_code(self, leave: LocalCode | None) -> None:
        """Say which provider code in files may be run (see `apt.core.local`); at first none, and with None again."""
        with self._lock:
            self._leave = leave
            self._ready_local.clear()

    def check_conflicts(self, providers: Iterable[Provider | str] | None = None) -> list[Fault]:
        """Every exclusion that these providers violate, once each; by default, those of all instances that were made.

        Providers are instances or ``"kind.name"``; the classes of named ones are imported.
        """
        if providers is None:
            with self._lock:
                providers = [*self._ready.values(), *self._ready_local.values()]
        used = (self.used("", provider) for provider in providers)
        unique = {f"{one.kind}.{one.name}": one for one in used}
        return find_conflicts(replace(one, where=key) for key, one in unique.items())

    def used(self, where: str, provider: Provider | str) -> Used:
        """A provider in use at `where`, with all that it excludes."""
        if isinstance(provider, Provider):
            record, found = record_of(provider), type(provider)
            kind, name = record.kind, record.name
        else:
            kind, _, name = provider.replace(":", ".", 1).partition(".")
            found = self.load(kind, name)
        return Used.of(where, kind, name, found, self._excludes.get((kind, name), ()))

    def clear_cache(self, kind: str | None = None, name: str | None = None) -> None:
        """Forget instances and failed imports, of all kinds, of one, or of one provider; nothing is unregistered."""
        with self._lock:
            for table in (self._ready, self._ready_local):
                for key in [key for key in table if kind in (None, key[0]) and name in (None, key[1])]:
                    del table[key]
            for failed in [key for key in self._failures if kind in (None, key[0]) and name in (None, key[1])]:
                del self._failures[failed]

    def refresh(self) -> None:
        """Read again what is installed; what was registered by hand stays."""
        with self._lock:
            self._catalogue.refresh()
            self._classes = {key: each for key, each in self._classes.items() if self._catalogue.is_registered(*key)}
            self.clear_cache()

    def _order(self, kind: str, name: str) -> tuple[int, str]:
        provider = self._classes.get((kind, name))
        return (-provider.get_priority() if provider else 0, name)

    def _load(self, kind: str, name: str) -> tuple[ProviderRecord, type[Provider]]:
        if is_local(name):
            record, code = read_local(kind, name, self._leave)
            return record, check_class(record, run_local(record, code))
        record = self._catalogue.get_record(kind, name)
        provider = self._classes.get((kind, name))
        if provider is None:
            found = self.load_object(kind, name)
            with self._remembering_failure():
                provider = check_class(record, found)
            with self._lock:
                self._classes[kind, name] = provider
        return record, provider

    @contextmanager
    def _remembering_failure(self) -> Iterator[None]:
        try:
            yield
        except ProviderBrokenError as error:
            with self._lock:
                self._failures[error.kind, error.name] = str(error)
            raise

    def _make(self, kind: str, name: str, options: Mapping[str, object]) -> Provider:
        record, found = self._load(kind, name)
        check_dependencies(record, found)
        faults = {fault.where: fault for fault in mistyped(found, options)}
        try:
            provider = found.model_validate(dict(options), context={"registry": self})
        except ValidationError as error:
            faults |= {fault.where: fault for fault in explain(error, found, options)}
        except AptError:
            raise
        except (Exception, SystemExit) as error:
            message = f"{record}: checking its options failed: {type(error).__name__}: {error}"
            raise ProviderBrokenError(kind, name, message) from error
        if faults:
            raise OptionsError(kind, name, [below(f"{kind}.{name}", fault) for fault in faults.values()])
        provider._record = record
        return provider

    def _get(self, kind: str, name: str, options: Mapping[str, object] | None, text: str | None) -> Provider:
        key = (kind, name, None if text == "{}" else text)
        local = is_local(name)  # its file is read each time: it may have changed
        ready = self._ready_local if local else self._ready
        provider = ready.get(key)
        if provider is None or local:
            made = self._make(kind, name, options or {})
            # Imports and validation ran without the lock, so that another thread's import cannot wait for this one.
            with self._lock:
                provider = ready.get(key)
                if provider is None or record_of(provider) != record_of(made):
                    self._call_hooks(made)
                    provider = made
                    # Another class may have been registered while this one was made.
                    if local or self._classes.get((kind, name)) is type(made):
                        ready[key] = made
        return provider

    def _call_hooks(self, provider: Provider) -> None:
        for callback in self._hooks.get(record_of(provider).kind, ()):
            callback(provider)

    def _resolve(self, kind: str, choice: Choice, make: Callable[[str, Mapping[str, object]], Provider]) -> Resolution:
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
        raise type(reasons[0])(kind, choice.provider, "; ".join(map(str, reasons)))


def resolve_slot(interface: type[P], value: object, context: object) -> P:
    """The nested provider that an option of type ``Slot[interface]`` means.

    `value` is a provider, its name, or ``{provider: name, fallback: [...], **options}``; `context` is pydantic's and
    may hold the registry. Raises `PydanticCustomError`, so that it is reported among the other faults of the options.
    """
    if isinstance(value, interface):
        return value
    used = context.get("registry") if isinstance(context, Mapping) else None
    here = used if isinstance(used, Registry) else registry
    try:
        provider = here.resolve_new(interface.kind, read_choice(interface.kind, value))
        if not isinstance(provider, interface):
            raise ProviderBrokenError(interface.kind, provider.get_name(), f"is not a {interface.__qualname__}")
    except ProviderError as error:
        raise PydanticCustomError(PROVIDER_FAULT, "{message}", {"message": str(error), "error": error}) from error
    return provider


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


__all__ = [
    "Provider",
    "ProviderRecord",
    "Registry",
    "Resolution",
    "get_provider",
    "record_of",
    "register_provider",
    "registry",
    "resolve_slot",
]
