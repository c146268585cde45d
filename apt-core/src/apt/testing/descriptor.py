"""Checks of every provider, whatever its kind: what it says of itself without PyTorch."""

from __future__ import annotations

import subprocess
import sys

from apt.core.discovery import FILE, REGISTERED
from apt.core.hooks import HookRunner
from apt.core.providers import Plugin
from apt.core.resolution import record_of
from apt.testing.kit import NotApplicable, Subject, check, demand


@check()
def description(subject: Subject) -> None:
    """A provider says in its docstring what it is, and each option what it does."""
    provider = type(subject.provider)
    own = provider.__dict__.get("__doc__") or ""
    demand(own.strip(), f"{provider.__qualname__} has no docstring; `apt-core providers show` has nothing to show")
    silent = [name for name, field in provider.model_fields.items() if not field.description]
    demand(not silent, f"options without a description: {', '.join(silent)}; use Field(description=...)")


@check()
def frozen_and_closed(subject: Subject) -> None:
    """Options cannot be changed, and unknown ones are refused."""
    config = type(subject.provider).model_config
    demand(config.get("frozen"), "model_config has frozen=False; a provider's options never change")
    demand(config.get("extra") == "forbid", "model_config allows unknown options; a typo would pass in silence")


@check()
def torch_free(subject: Subject) -> None:
    """Importing the provider's class imports no PyTorch."""
    record = record_of(subject.provider)
    if record.distribution in (FILE, REGISTERED):
        raise NotApplicable("it is not installed, so it cannot be imported in a process of its own")
    code = (
        "import sys; from apt.core.registry import registry; "
        f"registry.load({record.kind!r}, {record.name!r}); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    demand(not done.returncode, done.stderr or "import torch in the method that makes the part, not at the top")


@check()
def options_survive_a_checkpoint(subject: Subject) -> None:
    """Options that are written to a checkpoint and read back are the same."""
    said = subject.provider.model_dump(mode="json")
    again = type(subject.provider).model_validate(said, context={"registry": subject.registry})
    demand(again.model_dump(mode="json") == said, f"{said} comes back as {again.model_dump(mode='json')}")


@check("plugin")
def hooks_are_well_formed(subject: Subject) -> None:
    """Every hook exists and takes arguments that the hook has."""
    assert isinstance(subject.provider, Plugin)
    HookRunner({"under-test": subject.provider})
