"""Commands that packages bring: entry points ``command.<name>`` in the group `apt.providers`.

Their names are read from metadata; a package is imported only when its command is called.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from contextlib import suppress

from apt.core.catalogue import COMES_WITH, COMMAND
from apt.core.registry import registry
from apt.errors import ProviderBrokenError, UserError

Command = Callable[[Sequence[str]], int]


def list_commands() -> list[str]:
    """The names of the commands that installed packages bring.

    Where APT_DISABLE_PLUGINS or APT_ONLY_PLUGINS is wrong there are none: whatever uses the registry says why.
    """
    with suppress(UserError):
        return registry.list_providers("command").get("command", [])
    return []


def find_command(name: str, own: Container[str]) -> Command | None:
    """The command of this name, imported; None where no package brings it, or it is one of apt-core's `own`.

    Raises `apt.errors.ProviderError` where the package is broken, or known and not installed.
    """
    if name in own or (name not in list_commands() and f"{COMMAND}.{name}" not in COMES_WITH):
        return None
    found = registry.load_object(COMMAND, name)
    if not callable(found):
        raise ProviderBrokenError(
            "command", name, f"command.{name} is a {type(found).__name__}, which cannot be called"
        )
    return found
