"""Every error that APT raises on purpose, and the one shape they share: where, what is wrong, what would be right.

`UserError` is the user's to mend (the command exits with 2); any other `AptError` is a fault of ours or of a
provider (exit 1). Faults of one file are collected and reported together.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_WORD, MAX_TEXT = 400, 2_000
_LONG_WORD = re.compile(rf"\S{{{MAX_WORD + 1},}}")


def shortened(text: str, limit: int) -> str:
    """The text, without its middle where it is longer than `limit`."""
    left_out = len(text) - limit
    return text if left_out <= 0 else f"{text[: limit // 2]}...({left_out:,} characters)...{text[-limit // 2 :]}"


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: `where` it stands, `what` is wrong with it, and `hint`, what would be right.

    What is given may be of any length; what is said of it is not.
    """

    where: str
    what: str
    hint: str = ""

    def __post_init__(self) -> None:
        for name in ("where", "what", "hint"):
            object.__setattr__(self, name, shortened(getattr(self, name), MAX_TEXT))

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f"; {self.hint}" if self.hint else "")


class AptError(Exception):
    """Base of all errors raised on purpose; words that nobody can read are shortened."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(_LONG_WORD.sub(lambda found: shortened(found[0], MAX_WORD), message))


class UserError(AptError):
    """The input is wrong: a profile, an option, a path, an environment variable."""

    exit_code = 2


class FaultsError(UserError):
    """Several faults, reported at once."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("\n".join(str(fault) for fault in faults))
        self.faults = tuple(faults)


class ProfileError(FaultsError):
    """A profile that cannot be used."""


class ScheduleError(FaultsError):
    """A schedule that is not well formed, or a value that was asked for and has none."""


class ProviderError(UserError):
    """A provider cannot be had. `kind` and `name` say which."""

    def __init__(self, kind: str, name: str, message: str) -> None:
        super().__init__(message)
        self.kind, self.name = kind, name


class ProviderNotFoundError(ProviderError):
    """No installed distribution offers this provider."""


class ProviderBrokenError(ProviderError):
    """The distribution is installed, but its provider cannot be imported or is not what its entry point says."""


class ProviderCollisionError(ProviderError):
    """Two distributions claim one name; APT never picks one of them."""


class ProviderDisabledError(ProviderError):
    """Turned off by APT_DISABLE_PLUGINS or APT_ONLY_PLUGINS."""


class RequirementError(ProviderError):
    """What the provider needs is not installed, or not in that version."""


class OptionsError(ProviderError):
    """The provider refuses its options."""

    def __init__(self, kind: str, name: str, faults: Sequence[Fault]) -> None:
        super().__init__(kind, name, "\n".join(str(fault) for fault in faults))
        self.faults = tuple(faults)


class ConflictError(FaultsError):
    """Providers that exclude one another are used together."""


class PluginError(AptError):
    """A plugin failed in a hook; the message names plugin, distribution, version, hook and step."""


class ProofOfUseError(AptError):
    """A provider is switched on, but its modules did not run or its parameters got no finite gradient."""


class SwitchError(AptError):
    """Switching a plugin on changed what the model had learnt, by more than the profile allows."""


class NotFiniteError(AptError):
    """A loss or a gradient is not finite; the message names step, batch, and whose modules it came from."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or made by another model than the profile's."""


class DataError(UserError):
    """The text cannot be read, or there is too little of it."""


class ProviderFallbackWarning(UserWarning):
    """Another provider than the one that was asked for is used; the text says which, and why."""


class LockWarning(UserWarning):
    """A checkpoint was made by other providers, versions, sources or options than those here; the text says which."""


def origin_of(error: BaseException) -> BaseException:
    """The error that a hook itself raised, where a plugin failed in one; else this one."""
    return error.__cause__ or error if isinstance(error, PluginError) else error


def nearest(name: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?`` for the nearest known name, or nothing."""
    if len(name) > MAX_WORD:
        return ""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else ""
