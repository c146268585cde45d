"""From a record to the class that it names: requirements first, then the import, then whether it is what it says.

Whatever goes wrong in somebody else's package ends here, as one `ProviderError` that names provider, distribution and
version. An import that takes long is named in the log while it does (`apt-core doctor` gives each one a time limit).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from apt.core.discovery import REGISTERED, ProviderRecord
from apt.core.provider import API_LEVEL, Provider
from apt.core.providers import INTERFACES
from apt.errors import ProviderBrokenError, RequirementError

log = logging.getLogger(__name__)
SLOW_IMPORT_SECONDS = 5.0


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
    except (Exception, SystemExit) as error:
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
    if found.api_level != API_LEVEL:
        message = (
            f"{record} is written for API level {found.api_level} of apt-core; this apt-core has level {API_LEVEL}"
        )
        raise ProviderBrokenError(record.kind, record.name, f"{message}; {_other_version(record)}")
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise _broken(record, f"{found.__qualname__} does not implement {', '.join(missing)}")
    return found


def check_distribution(record: ProviderRecord) -> None:
    """Hold the distribution's `Requires-Dist` against what is installed; see `apt.core.requirements`.

    Raises `RequirementError`, or `ProviderBrokenError` where it is built for another apt-core.
    """
    from apt.core.requirements import InvalidRequirement, check_record, install_line

    try:
        unmet = check_record(record)
    except InvalidRequirement as error:
        raise _broken(record, f"its metadata is damaged: {error}") from error
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
        raise _broken(record, f"get_dependencies: {error}") from error
    except Exception as error:
        raise _broken(record, f"get_dependencies failed: {type(error).__name__}: {error}") from error
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
