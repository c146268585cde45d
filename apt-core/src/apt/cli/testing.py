"""The command that holds a provider to the checks of its kind: apt-core test KIND.NAME."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apt.cli.running import Commands


def add_commands(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the commands of this module."""
    test = commands.add_parser(
        "test",
        help="hold a provider to every check of its kind",
        description="Build a provider's part at small sizes and hold it to every law of its kind: shapes, gradients, "
        "causality, caches, its own estimates. Exits with 1 where one does not hold.",
    )
    test.add_argument("provider", metavar="KIND.NAME", help="such as attention.sdpa, or attention../mine.py:Mine")
    test.add_argument(
        "--set", dest="sets", action="append", default=[], metavar="OPTION=VALUE", help="an option; may be repeated"
    )
    test.add_argument("--allow-local-code", action="store_true", help="run provider code that lies in a file")
    test.set_defaults(run=_test)


def _test(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from apt.core import yaml
    from apt.core.local import LocalCode
    from apt.core.registry import registry
    from apt.errors import UserError
    from apt.testing.kit import iterate

    kind, point, name = arguments.provider.partition(".")
    if not point:
        raise UserError(f"test: {kind!r} is not of the form KIND.NAME; such as attention.sdpa")
    options: dict[str, object] = {}
    for text in arguments.sets:
        option, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: is not of the form option=value")
        options[option.strip()] = yaml.parse_value(value)
    registry.allow_local_code(LocalCode(Path.cwd(), anywhere=arguments.allow_local_code))
    counts = dict.fromkeys(("passed", "failed", "not applicable"), 0)
    for result in iterate(kind, name, options):
        counts[result.outcome] += 1
        mark = {"passed": "ok    ", "failed": "FAILED", "not applicable": "  -   "}[result.outcome]
        print(f"{mark}  {result.check.law}" + (f"\n        {result.message}" if result.message else ""), flush=True)
    print(f"\n{kind}.{name}: " + ", ".join(f"{number} {outcome}" for outcome, number in counts.items() if number))
    return 1 if counts["failed"] else 0
