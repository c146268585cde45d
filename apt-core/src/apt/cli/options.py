"""Options that several commands share, and how a profile is read from them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apt.core.profile import Profile


def add_profile_options(parser: argparse.ArgumentParser, *, positional: bool) -> None:
    """The profile itself, and what changes it from the command line."""
    if positional:
        parser.add_argument("profile", type=Path, metavar="FILE", help="a profile (YAML)")
    else:
        parser.add_argument("-p", "--profile", type=Path, metavar="FILE", required=True, help="a profile (YAML)")
    add_changes(parser)
    parser.add_argument(
        "--allow-local-code", action="store_true", help="run provider code that lies in files beside the profile"
    )


def add_changes(parser: argparse.ArgumentParser) -> None:
    """What changes a profile from the command line."""
    parser.add_argument(
        "--set",
        dest="sets",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="a value for any dotted path, such as model.d_model=128; may be repeated",
    )
    parser.add_argument(
        "--plugins", nargs="*", metavar="NAME", help="the plugins to list, in place of the profile's own"
    )


def read_profile(arguments: argparse.Namespace) -> Profile:
    """The profile that the options name, validated and resolved."""
    from apt.core.profile import load_profile

    return load_profile(
        arguments.profile,
        sets=arguments.sets,
        plugins=arguments.plugins,
        allow_local_code=arguments.allow_local_code,
    )


def print_notes(profile: Profile) -> None:
    """One line for each old key that was translated."""
    for note in profile.notes:
        print(f"deprecated: {note}", file=sys.stderr)
