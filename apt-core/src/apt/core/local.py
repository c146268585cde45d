"""Provider code that lies in a file beside the profile: ``attention: {provider: ./my_attention.py:Mine, r: 4}``.

Running a file that a profile names is running a stranger's program, so it needs leave. A file is run only when
1. the profile was given on the command line (or the caller of `Registry.allow_local_code` says so), and the file lies
   in that profile's folder or below it, links followed (a `base` names files as seen from its own folder); or
2. ``--allow-local-code`` was given: then any file; a relative name is looked for in the profile's folder, then in the
   current one.
A checkpoint holds a copy of the code that it was trained with (`kept_name`). Its profile is never given on the command
line, so only the flag lets that code run. The digest of what was run is recorded; the bytes that are hashed are the
bytes that are run.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from urllib.parse import quote

from apt.core.discovery import FILE, ProviderRecord
from apt.errors import ProviderBrokenError, ProviderDisabledError, ProviderNotFoundError

_LOCAL = re.compile(r"(?P<file>[^\0\n]*\.py):(?P<attribute>[A-Za-z_]\w*)")
_CODE = "__apt_code__"
MODULE = "apt_local_"
"""What the names of modules of local code begin with."""
HOW = "give the profile on the command line from the folder that holds the file, or add --allow-local-code"


@dataclass(frozen=True)
class LocalCode:
    """Leave to run provider code in files under `folder`; `anywhere` lifts the restriction to that folder."""

    folder: Path
    anywhere: bool = False


def real_path(path: Path) -> Path:
    """The path with its links followed. One that leads back to itself is left to whoever opens the file, who says so.

    `Path.resolve` raises RuntimeError for it before Python 3.13.
    """
    return Path(os.path.realpath(path))


def is_local(name: str) -> bool:
    """Whether a provider's name means code in a file."""
    return _LOCAL.fullmatch(name) is not None


def seen_from(name: str, folder: Path, top: Path) -> str:
    """The name of code in a file that a profile in `folder` says, as a profile in `top` would say it."""
    match = _LOCAL.fullmatch(name)
    if match is None or Path(match["file"]).is_absolute():
        return name
    path = os.path.relpath(folder / match["file"], top)
    return f"{path if path.startswith('.') else f'./{path}'}:{match['attribute']}"


def kept_name(name: str) -> str:
    """What the copy of the file is called in a checkpoint: one name for each path, without folders."""
    return "local-" + quote(name.rpartition(":")[0].removeprefix("./"), safe="")


def read_local(kind: str, name: str, leave: LocalCode | None) -> tuple[ProviderRecord, bytes]:
    """The record of local code and the bytes of its file; nothing is run.

    Raises `ProviderDisabledError` without leave, `ProviderNotFoundError` where there is no such file.
    """
    match = _LOCAL.fullmatch(name)
    if match is None:
        raise ProviderNotFoundError(kind, name, f"{name!r} is not of the form ./file.py:Class")
    if leave is None:
        raise ProviderDisabledError(kind, name, f"{name}: code in a file is not run unasked; {HOW}")
    folder = real_path(leave.folder)
    path = real_path(folder / match["file"])
    if leave.anywhere:
        # What a checkpoint keeps is what made its model, whatever has become of the file.
        kept = folder / kept_name(name)
        path = kept if kept.is_file() else path if path.is_file() else real_path(Path(match["file"]))
    if not leave.anywhere and not path.is_relative_to(folder):
        raise ProviderDisabledError(kind, name, f"{name}: {path} lies outside of {folder}; {HOW}")
    try:
        code = path.read_bytes()
    except OSError as error:
        has_copy = not leave.anywhere and (folder / kept_name(name)).is_file()
        why = f"{error.strerror}{'; a copy lies here: add --allow-local-code' if has_copy else ''}"
        raise ProviderNotFoundError(kind, name, f"{name}: {path} cannot be read: {why}") from error
    digest = hashlib.sha256(code).hexdigest()
    record = ProviderRecord(
        kind, name, FILE, f"sha256:{digest[:12]}", match["attribute"], path=str(path), sha256=digest
    )
    return record, code


def code_of(record: ProviderRecord) -> bytes:
    """The bytes that were run for a record, whatever has become of its file."""
    code: bytes = vars(sys.modules[_module_name(record)])[_CODE]
    return code


def _module_name(record: ProviderRecord) -> str:
    return f"{MODULE}{hashlib.sha256(record.path.encode()).hexdigest()[:8]}_{record.sha256[:12]}"


def run_local(record: ProviderRecord, code: bytes) -> object:
    """Run the file once for each content, and return what the record names in it.

    Raises `ProviderBrokenError` where it cannot be run or holds no such thing.
    """
    module_name = _module_name(record)
    module = sys.modules.get(module_name)
    if module is None:
        module = ModuleType(module_name)
        module.__file__ = record.path
        vars(module)[_CODE] = code
        sys.modules[module_name] = module  # classes in it look up their annotations there
        try:
            exec(compile(code, record.path, "exec"), module.__dict__)
        except (Exception, SystemExit) as error:
            del sys.modules[module_name]
            message = f"{record.name}: running {record.path} failed: {type(error).__name__}: {error}"
            raise ProviderBrokenError(record.kind, record.name, message) from error
    try:
        return getattr(module, record.entry_point)
    except AttributeError:
        message = f"{record.name}: {record.path} holds no {record.entry_point}"
        raise ProviderBrokenError(record.kind, record.name, message) from None
