"""APT, a microkernel for transformer language models.

Importing this package imports nothing else: no provider, no PyTorch, no configuration. Everything public is in its
modules; ``from apt.core import registry, Provider, APTConfig, Schedule`` is the usual beginning.
"""

from __future__ import annotations


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            found = version("apt-core")
        except PackageNotFoundError:  # run from a source tree that is not installed
            found = "0"
        globals()["__version__"] = found
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
