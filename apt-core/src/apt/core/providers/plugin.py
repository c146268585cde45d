"""Plugins: what a profile's `plugins` list switches on, to take part in the run through hooks."""

from __future__ import annotations

from typing import ClassVar

from apt.core.provider import Provider


class Plugin(Provider):
    """Takes part in a run by hook implementations: methods marked ``@apt.hookspecs.hookimpl``.

    A plugin keeps what it needs during a run in private attributes (`pydantic.PrivateAttr`); its options are frozen
    as any provider's. Names in `scheduled` whose buffer is ``""`` are read from ``state.values`` in the hooks.
    """

    kind: ClassVar[str] = "plugin"
