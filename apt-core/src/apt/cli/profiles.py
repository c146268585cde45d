"""Commands about profiles: schema, profile new|show|diff, schedule plot. None of them loads PyTorch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from apt.cli.options import add_profile_options


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands of this module."""
    schema = commands.add_parser("schema", help="print the JSON Schema of profiles, for exactly what is installed")
    schema.set_defaults(run=_schema)

    profile = commands.add_parser("profile", help="make, show and compare profiles")
    verbs = profile.add_subparsers(dest="verb", metavar="VERB", required=True)
    new = verbs.add_parser("new", help="write a profile to start from")
    new.add_argument("file", type=Path, metavar="FILE", help="must not exist yet")
    new.set_defaults(run=_new)
    show = verbs.add_parser("show", help="print the resolved profile, with the origin of each value")
    add_profile_options(show, positional=True)
    show.set_defaults(run=_show)
    diff = verbs.add_parser("diff", help="print where two profiles differ once resolved")
    diff.add_argument("first", type=Path, metavar="FILE")
    diff.add_argument("second", type=Path, metavar="FILE")
    diff.set_defaults(run=_diff)

    schedule = commands.add_parser("schedule", help="look at a profile's schedules before any training")
    verbs = schedule.add_subparsers(dest="verb", metavar="VERB", required=True)
    plot = verbs.add_parser("plot", help="draw every scheduled value and switch over the run")
    add_profile_options(plot, positional=True)
    plot.add_argument("--out", type=Path, metavar="FILE", help="a .png or .svg file (default: draw in the terminal)")
    plot.set_defaults(run=_plot)


def _schema(arguments: argparse.Namespace) -> int:
    from apt.core.schema import profile_schema

    print(json.dumps(profile_schema(), indent=2))
    return 0
