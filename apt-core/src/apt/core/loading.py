"""From a record to the class that it names: requirements first, then the import, then whether it is what it says.

Whatever goes wrong in somebody else's package ends here, as one `ProviderError` that names provider, distribution and
version. An import that takes long is named in the log while it does (`apt-core doctor` gives each one a time limit).
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from pydantic import TypeAdapter, ValidationError

from apt.core.discovery import REGISTERED, ProviderRecord
from apt.core.options import lowered
from apt.core.provider import API_LEVEL, Provider
from apt.core.providers import INTERFACES
from apt.errors import ProviderBrokenError, RequirementError

log = logging.getLogger(__name__)
SLOW_IMPORT_SECONDS = 5.0
DECLARED: dict[str, TypeAdapter[object]] = {
    "api_level": TypeAdapter(int),
    "excludes": TypeAdapter(tuple[str, ...]),
    "capabilities": TypeAdapter(frozenset[str]),
    "scheduled": TypeAdapter(dict[str, str]),
    "losses": TypeAdapter(dict[str, str]),
    "switched_by": TypeAdapter(str | None),
    "needs_plugin": TypeAdapter(str | None),
}
"""What a class declares beside its options, and of which type it has to be."""


def load_object(record: ProviderRecord) -> object:
    """Import what the record names.

    Raises `RequirementError` before anything is imported, `ProviderBrokenError` where the import fails.
    """
    check_distribution(record)
    module_name, _, attribute = record.entry_point.partition(":")
    try:
        with _naming_slow(record):
            found: object = import_module(module_name)
            for part in attribute.split("."):
                found = getattr(found, part)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        message = f"{record}: importing {record.entry_point} failed: {type(error).__name__}: {error}"
        raise ProviderBrokenError(record.kind, record.name, message) from error
    return found


def check_class(record: ProviderRecord, found: object) -> type[Provider]:
    """The object as a provider class of the record's kind.

    Raises `ProviderBrokenError` where it is not one, is not complete, or was written for another API level.
    """
    interface = INTERFACES.get(record.kind, Provider)
    if not (isinstance(found, type) and issubclass(found, interface)):
        base = f"{interface.__module__}.{interface.__qualname__}"
        what = f"class {found.__qualname__}" if isinstance(found, type) else repr(found)
        raise _broken(record, f"{what} is not a subclass of {base}")
    if getattr(found, "kind", record.kind) != record.kind:
        raise _broken(record, f"its class says kind = {found.kind!r}")
    _check_declared(record, found)
    if found.api_level != API_LEVEL:
        message = (
            f"{record} is written for API level {found.api_level} of apt-core; this apt-core has level {API_LEVEL}"
        )
        raise ProviderBrokenError(record.kind, record.name, f"{message}; {_other_version(record)}")
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise _broken(record, f"{found.__qualname__} does not implement {', '.join(missing)}")
    _check_takes(record, found, interface)
    return found


def _check_takes(record: ProviderRecord, found: type[Provider], interface: type[Provider]) -> None:
    """Whether the method that makes the part takes what it will be called with, whatever names it has for it."""
    if not interface.makes:
        return
    called, takes = (inspect.signature(getattr(each, interface.makes)) for each in (interface, found))
    try:
        takes.bind(*called.parameters)
    except TypeError as error:
        given = ", ".join(list(called.parameters)[1:])
        raise _broken(record, f"its {interface.makes} does not take ({given}): {error}") from error


def _check_declared(record: ProviderRecord, found: type[Provider]) -> None:
    """Whether what the class says of itself can be read; a text in place of a tuple of texts would be a tuple of letters."""
    for name, adapter in DECLARED.items():
        try:
            adapter.validate_python(getattr(found, name), strict=name == "api_level")
        except ValidationError as error:
            what = lowered(error.errors(include_url=False)[0]["msg"])
            raise _broken(record, f"its {name} is {getattr(found, name)!r}: {what}") from error
    with _asking(record, "get_priority"):
        priority = found.get_priority()
    if not isinstance(priority, int):
        raise _broken(record, f"get_priority gives {priority!r}, which is not a whole number")
    with _asking(record, "get_dependencies"):
        needed = found.get_dependencies()
    if not isinstance(needed, list | tuple) or not all(isinstance(each, str) for each in needed):
        raise _broken(record, f"get_dependencies gives {needed!r}, which is not a list of texts")


@contextmanager
def _asking(record: ProviderRecord, method: str) -> Iterator[None]:
    """Name the provider in whatever its method raises."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise _broken(record, f"{method} failed: {type(error).__name__}: {error}") from error


def check_distribution(record: ProviderRecord) -> None:
    """Hold the distribution's `Requires-Dist` against what is installed; see `apt.core.requirements`.

    Raises `RequirementError`, or `ProviderBrokenError` where it is built for another apt-core.
    """
    from apt.core.requirements import InvalidRequirement, check_record, install_line

    try:
        unmet = check_record(record)
    except InvalidRequirement as error:
        raise _broken(record, f"its metadata is damaged: {' '.join(str(error).split())}") from error
    for one in unmet:
        if one.distribution == "apt-core":
            message = f"{record} is built for {one.requirement}; this is {one.installed}"
            raise ProviderBrokenError(record.kind, record.name, f"{message}; {_other_version(record)}")
    if unmet:
        needs = ", and ".join(map(str, unmet))
        raise RequirementError(record.kind, record.name, f"{record} needs {needs}: {install_line(unmet)}")


def check_dependencies(record: ProviderRecord, provider: type[Provider]) -> None:
    """Hold what the class itself says that it needs against what is installed. Raises `RequirementError`."""
    from apt.core.requirements import InvalidRequirement, check_requirements, install_line

    try:
        unmet = check_requirements(provider.get_dependencies())
    except InvalidRequirement as error:
        raise _broken(record, f"get_dependencies: {' '.join(str(error).split())}") from error
    if unmet:
        needs = ", and ".join(map(str, unmet))
        raise RequirementError(record.kind, record.name, f"{record} needs {needs}: {install_line(unmet)}")


def registered(kind: str, name: str, target: str) -> ProviderRecord:
    """The record of a provider that was registered by hand."""
    return ProviderRecord(kind, name, REGISTERED, "0", target)


def _other_version(record: ProviderRecord) -> str:
    return f"install a version of {record.distribution} that goes with this one"


def _broken(record: ProviderRecord, what: str) -> ProviderBrokenError:
    return ProviderBrokenError(record.kind, record.name, f"{record} ({record.entry_point}): {what}")


@contextmanager
def _naming_slow(record: ProviderRecord) -> Iterator[None]:
    timer = threading.Timer(
        SLOW_IMPORT_SECONDS,
        log.warning,
        ("%s is still being imported after %g s (%s)", record, SLOW_IMPORT_SECONDS, record.entry_point),
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
