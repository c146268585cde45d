"""Commands that packages bring: entry points ``command.<name>`` in the group `apt.providers`.

Their names are read from metadata; a package is imported only when its command is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from apt.core.registry import registry
from apt.errors import ProviderBrokenError

Command = Callable[[Sequence[str]], int]


def list_commands() -> list[str]:
    """The names of the commands that installed packages bring."""
    return registry.list_providers("command").get("command", [])


def find_command(name: str) -> Command | None:
    """The command of this name, imported; None where no package brings it.

    Raises `apt.errors.ProviderError` where the package is broken.
    """
    if name not in list_commands():
        return None
    found = registry.load_object("command", name)
    if not callable(found):
        raise ProviderBrokenError(
            "command", name, f"command.{name} is a {type(found).__name__}, which cannot be called"
        )
    return found
