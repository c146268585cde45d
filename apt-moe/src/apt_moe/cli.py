"""``apt-core moe inspect RUN --text FILE``: which tokens go to which expert."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(words: Sequence[str]) -> int:
    """Run the command with the words after its name; returns the exit code."""
    parser = argparse.ArgumentParser(prog="apt-core moe", description="Look into the experts of a trained run.")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="colour a text by the experts that serve it, and list their tokens")
    inspect.add_argument("folder", type=Path, metavar="RUN", help="a run's folder, or one of its checkpoints")
    inspect.add_argument("--text", type=Path, required=True, metavar="FILE", help="the text to read")
    inspect.add_argument("--layer", type=int, metavar="N", help="the block whose experts are shown (default: the last)")
    inspect.add_argument("--top", type=int, default=8, metavar="N", help="tokens listed for each expert (default: 8)")
    inspect.add_argument("--chars", type=int, default=2000, metavar="N", help="of the text coloured (default: 2000)")
    inspect.add_argument(
        "--allow-local-code", action="store_true", help="run provider code that the run's profile names by file"
    )
    arguments = parser.parse_args(words)
    from apt_moe.inspecting import inspect_run

    inspect_run(
        arguments.folder,
        arguments.text,
        layer=arguments.layer,
        top=arguments.top,
        chars=arguments.chars,
        allow_local_code=arguments.allow_local_code,
    )
    return 0
