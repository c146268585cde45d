"""The registry in one short script: register, get, fall back, exclude, list. It runs without PyTorch.

Run it with ``python examples/core_registry.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from pydantic import Field

from apt.core.providers import DataProvider, Document
from apt.core.registry import Registry
from apt.errors import OptionsError, ProviderFallbackWarning


class Countdown(DataProvider):
    """Documents that count down. Its fields are its options, with their ranges."""

    start: int = Field(default=3, ge=1, description="where the count begins")

    def read(self) -> Sequence[Document]:
        return [Document(name=str(number), text=f"{number}!") for number in range(self.start, 0, -1)]


class Telescope(DataProvider):
    """Documents from a telescope; it needs a package that nobody has, and does not go with a countdown."""

    excludes = ("data.countdown",)

    @classmethod
    def get_dependencies(cls) -> list[str]:
        return ["giant-telescope>=9"]

    def read(self) -> Sequence[Document]:
        return []


def main() -> None:
    """Everything that a registry does, in order."""
    registry = Registry()  # a fresh one; `apt.core.registry` knows what is installed as well

    # Register. Installed packages do it by an entry point instead: "data.countdown" = "package.provider:Countdown".
    registry.register("data", "countdown", Countdown, default=True)
    registry.register("data", "telescope", Telescope)

    # Get: one instance for each kind, name and options.
    provider = registry.get("data", "countdown", {"start": 2})
    print("reads:", " ".join(document.text for document in provider.read()))
    print("the same instance:", provider is registry.get("data", "countdown", {"start": 2}))
    print("with other options another:", provider is not registry.get("data", "countdown"))

    # Options are checked, and the message says what would be right.
    try:
        registry.get("data", "countdown", {"strat": 2}, fallback=False)
    except OptionsError as error:
        print("refused:", error)

    # Fall back: to the kind's default, never in silence. With fallback=False the same is an error.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ProviderFallbackWarning)
        stand_in = registry.get("data", "telescope")
    print("used instead:", stand_in.get_name())
    print("warned:", caught[0].message)

    # Exclude: all violations of a set of providers at once.
    for fault in registry.check_conflicts(["data.countdown", "data.telescope"]):
        print("conflict:", fault)

    # List; nothing is imported for it.
    print("providers:", registry.list_providers())
    print("countdown:", registry.get_info("data", "countdown")["description"])


if __name__ == "__main__":
    main()
