"""How checks are written down, found and run."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from apt.core.config import Choice
from apt.core.provider import Provider
from apt.core.providers import AttentionProvider
from apt.core.registry import Registry
from apt.core.registry import registry as installed
from apt.errors import AptError

if TYPE_CHECKING:
    from torch import nn

Outcome = Literal["passed", "failed", "not applicable"]
MODULES = {
    "attention": "attention",
    "ffn": "ffn",
    "router": "router",
    "align": "align",
    "retrieval": "retrieval",
    "data": "text",
    "tokenizer": "text",
    "logger": "logger",
}
"""Kind -> the module of `apt.testing` that holds its checks; every kind has those of `descriptor` too."""


class NotConformingError(AssertionError):
    """A law does not hold; the message gives what was seen and what would be right."""


class NotApplicable(Exception):
    """The provider does not promise what the check is about."""


@dataclass(frozen=True)
class Subject:
    """The provider under test, and where it was had from."""

    provider: Provider
    registry: Registry

    def build(self, *args: object, seed: int = 0, **kwargs: object) -> nn.Module:
        """Its part, made after seeding, on the CPU."""
        import torch

        torch.manual_seed(seed)
        part: nn.Module = getattr(self.provider, self.provider.makes)(*args, **kwargs)
        return part


@dataclass(frozen=True)
class Check:
    """One law: a function that raises `NotConformingError` where the law does not hold."""

    name: str
    law: str
    run: Callable[[Any], None]
    kinds: tuple[str, ...]
    gradient: bool = False
    """Whether it needs a backward pass, or PyTorch's counts of one; the others are run without where there is none on the CPU."""


CHECKS: list[Check] = []
"""All checks of the modules that were loaded, in the order in which they stand there."""


def check(*kinds: str, gradient: bool = False) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Write a function down as a check of these kinds (none: of all); its docstring is the law."""

    def write_down(function: Callable[[Any], None]) -> Callable[[Any], None]:
        law = (function.__doc__ or "").strip().partition("\n")[0]
        CHECKS.append(Check(function.__name__, law, function, kinds, gradient))
        return function

    return write_down


def demand(holds: object, message: str) -> None:
    """Raise `NotConformingError` unless it holds."""
    if not bool(holds):
        raise NotConformingError(message)


@dataclass(frozen=True)
class Result:
    """What one check found."""

    check: Check
    outcome: Outcome
    message: str = ""


@dataclass(frozen=True)
class Report:
    """What all checks of a provider found."""

    subject: str
    results: tuple[Result, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(result.outcome != "failed" for result in self.results)

    @property
    def failures(self) -> dict[str, str]:
        """The names of the checks that failed, and why."""
        return {result.check.name: result.message for result in self.results if result.outcome == "failed"}


def checks_of(kind: str) -> list[Check]:
    """The checks of a kind."""
    for module in dict.fromkeys(("descriptor", MODULES.get(kind, "descriptor"))):
        importlib.import_module(f"apt.testing.{module}")
    return [each for each in CHECKS if not each.kinds or kind in each.kinds]


def run_check(each: Check, subject: Subject) -> Result:
    """Run one check; whatever the provider raises is a failure, told in words."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _run(each, subject)
    except NotApplicable as reason:
        return Result(each, "not applicable", str(reason))
    except NotConformingError as error:
        return Result(each, "failed", str(error))
    except Exception as error:  # noqa: BLE001  a provider can raise anything, and the report tells it
        return Result(each, "failed", f"{type(error).__name__}: {error}")
    return Result(each, "passed")


def _run(each: Check, subject: Subject) -> None:
    provider = subject.provider
    if not isinstance(provider, AttentionProvider) or provider.supports_training("cpu"):
        each.run(subject)
    elif each.gradient:
        raise NotApplicable("supports_training('cpu') is False")
    else:
        import torch

        with torch.no_grad():
            each.run(subject)


def get_subject(kind: str, name: str, options: Mapping[str, object] | None, registry: Registry | None) -> Subject:
    """The provider with these options. Raises `ProviderError` where it cannot be had."""
    used = installed if registry is None else registry
    # Not validated: from Python an option may be a provider, which is no JSON value.
    choice = Choice.model_construct(provider=name, fallback=(), options=dict(options or {}))
    return Subject(used.resolve(kind, choice).provider, used)


def iterate(
    kind: str, name: str, options: Mapping[str, object] | None = None, registry: Registry | None = None
) -> Iterator[Result]:
    """The result of each check as it comes."""
    subject = get_subject(kind, name, options, registry)
    for each in checks_of(kind):
        yield run_check(each, subject)


def check_provider(
    kind: str, name: str, options: Mapping[str, object] | None = None, registry: Registry | None = None
) -> Report:
    """Hold a provider to every check of its kind. Raises `ProviderError` where it cannot be had."""
    return Report(f"{kind}.{name}", tuple(iterate(kind, name, options, registry)))


def conformance(key: str, options: Mapping[str, object] | None = None) -> Callable[[Check], None]:
    """A pytest test of each check for the provider ``kind.name``: ``test_conformance = conformance("ffn.mine")``."""
    import pytest

    kind, _, name = key.partition(".")
    if kind not in (*MODULES, "plugin"):
        raise AptError(f"conformance: {key!r} is not of the form kind.name; kinds: {', '.join(MODULES)}, plugin")

    @pytest.mark.parametrize("law", checks_of(kind), ids=lambda each: each.name)
    def test(law: Check) -> None:
        result = run_check(law, get_subject(kind, name, options, None))
        if result.outcome == "not applicable":
            pytest.skip(result.message)
        assert result.outcome == "passed", f"{law.law}\n{result.message}"

    return test
