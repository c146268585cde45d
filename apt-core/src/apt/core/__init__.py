"""The kernel: profiles, the registry, providers' interfaces, schedules. Nothing in it needs PyTorch.

`registry` here is the registry of this process, not the module of that name. Names that only some callers need are
imported when they are asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from apt.core.provider import Provider
from apt.core.registry import Registry, get_provider, register_provider, registry

if TYPE_CHECKING:
    from apt.core.config import APTConfig, APTModelConfig
    from apt.core.profile import load_profile
    from apt.core.resolve import resolve_config
    from apt.core.schedules import Schedule

_LATER = {
    "APTConfig": "config",
    "APTModelConfig": "config",
    "Schedule": "schedules",
    "load_profile": "profile",
    "resolve_config": "resolve",
}


def __getattr__(name: str) -> object:
    if name in _LATER:
        return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "APTConfig",
    "APTModelConfig",
    "Provider",
    "Registry",
    "Schedule",
    "get_provider",
    "load_profile",
    "register_provider",
    "registry",
    "resolve_config",
]
