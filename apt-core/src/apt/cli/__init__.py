"""The command line: `apt-core`, also ``python -m apt``.

Exit codes: 0 good, 2 the user's input is wrong, 1 a fault of ours or of a provider, 130 interrupted. A command imports
what it needs when it runs, so that ``--help`` and everything that only looks at profiles never load PyTorch.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Never, TextIO

from apt import __version__
from apt.cli import inspecting, pretrained, profiles, running, testing
from apt.cli.packages import find_command, list_commands
from apt.errors import AptError, nearest

DESCRIPTION = "Train, switch on in mid-run, compare and generate from transformer components that are packages."


class _Parser(argparse.ArgumentParser):
    """Names the nearest command or option where the user mistyped one."""

    def error(self, message: str) -> None:  # type: ignore[override]
        if "invalid choice: " in message and "(choose from " in message:
            given, _, allowed = message.partition("invalid choice: ")[2].partition(" (choose from ")
            hint = nearest(given.strip("'"), [word.strip(" ')") for word in allowed.split(",")])
            message += f"; {hint}" if hint else ""
        self.exit(2, f"error: {message}\n{self.format_usage()}")


def build_parser() -> argparse.ArgumentParser:
    """The parser with all of APT's own commands."""
    parser = _Parser(
        prog="apt-core",
        description=DESCRIPTION,
        epilog="Exit codes: 0 good, 2 the input is wrong, 1 a fault of ours or of a provider, 130 interrupted. "
        "Commands of installed packages: " + (", ".join(list_commands()) or "none") + ".",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"apt-core {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for module in (running, pretrained, inspecting, profiles, testing):
        module.add_commands(commands)
    return parser


def own_commands(parser: argparse.ArgumentParser) -> tuple[str, ...]:
    """The names of apt-core's own commands, which no package can take."""
    (commands,) = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    return tuple(commands.choices)


OF_THE_USER = {
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
    *(errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ELOOP),
}
"""What a file system refuses for reasons that the user can mend."""


def enter() -> Never:
    """Run the command of this process, and end the process."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    code = main()
    if "TORCHELASTIC_RUN_ID" in os.environ and "torch" in sys.modules:
        from apt.training.ranks import leave

        leave(code)
    sys.exit(code)


_cut_imports: list[int] = []
"""The signals that cut an import short."""


def _interrupt(number: int, frame: FrameType | None) -> Never:
    """Ctrl-C, noted where it cuts an import short: PyTorch swallows it there, and fails later of what is half imported."""
    if any(each.f_globals.get("__name__") == "importlib._bootstrap" for each, _ in traceback.walk_stack(frame)):
        _cut_imports.append(number)
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A model writes any character, also where the terminal has no picture of it.
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.showwarning = _show_warning
    try:
        parser = build_parser()
        if words and (command := find_command(words[0], own_commands(parser))) is not None:
            return command(words[1:])
        arguments = parser.parse_args(words)
        code = _run(arguments)
        sys.stdout.flush()
    except AptError as error:
        return _fail("\n".join((str(error), *getattr(error, "__notes__", ()))), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader has gone (``| head``); what is left in the buffer goes nowhere.
        from apt.core.shown import to_nowhere

        to_nowhere(sys.stdout.fileno())
        return 0
    except OSError as error:
        users = error.errno in OF_THE_USER
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", 2 if users else 1)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            traceback.print_exc()
            return _fail(f"{error.name} is not installed, which apt-core or a provider needs", 1)
        return _fail("this command needs PyTorch, which is not installed: pip install torch", 2)
    except Exception as error:  # noqa: BLE001  whatever it is, it is told in full, and with its author
        if not _cut_imports:
            traceback.print_exc()
        return _fail(f"this is a fault of {_author(error)}, not of your input; please report it there", 1)
    return int(code)


def _run(arguments: argparse.Namespace) -> int:
    try:
        return int(arguments.run(arguments))
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich's answer to a reader that has gone
            raise error.__context__ from None
        # No command of apt-core ends the interpreter, and what a provider wanted must not pass for a success.
        raise RuntimeError(f"the interpreter was told to end: sys.exit({error.code!r})") from error


def _author(error: BaseException) -> str:
    """Whose code was running when it happened: the innermost that a provider's package or file holds, else apt-core's."""
    from apt.core.discovery import REGISTERED
    from apt.core.local import MODULE
    from apt.core.registry import registry

    packages: dict[str, str] = {}
    with suppress(AptError):
        for record in registry.records():
            module = record.entry_point.partition(":")[0]
            packages[module if record.distribution == REGISTERED else module.partition(".")[0]] = record.origin
    while error.__cause__ is not None:
        error = error.__cause__
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        module = str(frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] == "apt":
            continue
        # A layer that does not take what it is called with is called by PyTorch, in whose code the error arises.
        called = type(frame.f_locals.get("self"))
        for name, place in (
            (module, f"{frame.f_code.co_filename}:{line}"),
            (called.__module__, f"calling {called.__qualname__}"),
        ):
            package = name.partition(".")[0]
            whose = (
                packages.get(name) or packages.get(package) or ("provider code" if name.startswith(MODULE) else None)
            )
            if whose is not None and package != "apt":
                return f"{whose} ({place})"
    return "apt-core"


def _fail(message: str, code: int) -> int:
    if _cut_imports:
        message, code = "interrupted", 130
    for line in message.splitlines() or [""]:
        print(f"error: {line}" if line and not line.startswith(" ") else line, file=sys.stderr)
    return code


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"warning: {message}", file=sys.stderr)


__all__ = ["build_parser", "main", "own_commands"]
