"""The record of a run: a folder that describes itself, and `metrics.jsonl`, a line an event."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import TextIO

import numpy as np
from torch import Tensor

from apt.core.config import APTConfig, HardwareProfile
from apt.core.lock import make_lock
from apt.core.registry import Resolution
from apt.core.resolve import Resolved
from apt.data.prepare import Prepared
from apt.training.durable import write_at_once
from apt.training.loggers import Loggers

METRICS, RECORD, CARD, PLOT = "metrics.jsonl", "record.json", "README.md", "loss.png"
LOCK, ENVIRONMENT, GIVEN = "lock.json", "environment.txt", "profile"
NOT_FINITE = "nonfinite"
"""The event of numbers that were not finite, where the run goes on."""


class Metrics:
    """Appends events to `metrics.jsonl` in `folder` (none: nowhere, for ranks that do not write).

    `kept` bytes of what is there are kept, none where the run is new: what was written beyond its checkpoint goes.
    """

    def __init__(self, folder: Path | None, kept: int, loggers: Loggers | None = None) -> None:
        self._file: TextIO | None = None
        if folder is not None:
            self._file = (folder / METRICS).open("a", buffering=1)
            self.cut(kept)
        self.kept = self.length
        """Bytes that were there before this process wrote any."""
        self._loggers = loggers

    @property
    def length(self) -> int:
        """Bytes written so far."""
        return 0 if self._file is None else os.fstat(self._file.fileno()).st_size

    def cut(self, length: int) -> None:
        """Leave the first `length` bytes."""
        if self._file is not None and length < self.length:
            self._file.truncate(length)

    def go_back(self, length: int, step: int) -> None:
        """To `step`, where there were `length` bytes. What tells since of numbers that were not finite stays, as their text stays
        left out.
        """
        if self._file is None:
            return
        with Path(self._file.name).open("rb") as file:
            file.seek(length)
            lines = file.read().decode().splitlines()
        self.cut(length)
        kept = [event for event in map(json.loads, lines) if event["event"] == NOT_FINITE]
        self._file.writelines(json.dumps(event) + "\n" for event in kept)
        if self._loggers is not None:
            self._loggers.go_back(step, kept)

    def write(self, event: str, **values: object) -> None:
        """One line, which each logger is told too. A number that is not finite becomes null, a tensor a list of its numbers."""
        if self._file is None:
            return
        line = {"event": event, **{key: _plain(value) for key, value in values.items()}}
        self._file.write(json.dumps(line) + "\n")
        if self._loggers is not None:
            self._loggers.log(line)

    def close(self) -> None:
        """No more events."""
        if self._file is not None:
            self._file.close()
        if self._loggers is not None:
            self._loggers.close()


def _plain(value: object) -> object:
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    # JSON has no other way to say it.
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(folder: Path) -> list[dict[str, object]]:
    """All events of a run; a last line that was cut off, and what else is no event, is left out."""
    events: list[dict[str, object]] = []
    for line in (folder / METRICS).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events


def write_record(
    folder: Path,
    config: APTConfig,
    resolved: Resolved,
    corpus: Prepared | None,
    parameters: int,
    calibration: Mapping[str, object] | None = None,
    parent: Mapping[str, object] | None = None,
    given: Sequence[Path] = (),
) -> None:
    """What the run was made of: the profile, providers, how products are computed, its parent, where it ran.

    `corpus` is None where the model was trained elsewhere.
    """
    versions = _versions()
    record = {
        "name": config.name,
        "started": _now(),
        "parent": parent,
        "command": sys.argv,
        "parameters": parameters,
        "calibration": calibration,
        "corpus_sha256": None if corpus is None else corpus.digest,
        "corpus": None
        if corpus is None
        else {
            "documents": corpus.num_documents,
            "bytes": corpus.num_bytes,
            "tokens": {name: len(split.tokens) for name, split in corpus.splits.items()},
            "cache": str(corpus.folder),
        },
        **_surroundings(resolved, versions),
        "resumed": [],
    }
    # First and at once, since it alone names the parent: without it a run that was killed here would begin anew.
    _write(folder / RECORD, record)
    _write(folder / LOCK, make_lock(resolved).to_dict())
    pinned = sorted((f"{name}=={version}" for name, version in versions.items()), key=str.lower)
    (folder / ENVIRONMENT).write_text("\n".join(pinned) + "\n")
    place = folder / GIVEN
    place.mkdir(exist_ok=True)
    for number, path in enumerate(given):
        # The profile itself first, then what it inherits from; two of one name lie in different folders.
        name = path.name if path.name not in {each.name for each in given[:number]} else f"{number}-{path.name}"
        copy = place / name
        if not (copy.exists() and copy.samefile(path)):  # a run that begins again from its own copy has it
            shutil.copyfile(path, copy)


def record_resume(folder: Path, resolved: Resolved, step: int) -> None:
    """Add to the record that the run went on at `step`, when and by what: providers and code may be others by then."""
    try:
        record = json.loads((folder / RECORD).read_text())
        resumed = [*record.get("resumed", ())]
    except (ValueError, AttributeError, TypeError):
        return  # of no use before either, and no reason not to go on
    again = {"step": step, "started": _now(), "command": sys.argv, **_surroundings(resolved, _versions())}
    _write(folder / RECORD, {**record, "resumed": [*resumed, again]})


def _versions() -> dict[str, str]:
    """Of every distribution that is installed; their metadata take a while to read."""
    return {each.metadata["Name"]: each.version for each in distributions()}


def _surroundings(resolved: Resolved, versions: Mapping[str, str]) -> dict[str, object]:
    """The code that runs, and where."""
    wanted = {"apt-core", "torch", "numpy", "pydantic", "safetensors"} | {
        each.distribution for each in resolved.resolutions
    }
    return {
        "providers": [resolution.to_dict() for resolution in resolved.resolutions],
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "hardware": HardwareProfile.detect_hardware().model_dump(mode="json"),
        "distributions": {name: versions[name] for name in sorted(wanted & set(versions))},
        "git": _git(),
    }


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _write(path: Path, record: Mapping[str, object]) -> None:
    write_at_once(path, json.dumps(record, indent=1) + "\n")


def provider_lines(resolutions: Iterable[Resolution], separator: str = "  ") -> list[str]:
    """One line a provider: where, which, of what distribution, and why it is not the one that was asked for."""
    lines = []
    for each in resolutions:
        why = f" (asked for {each.asked}: {each.why})" if each.why else ""
        lines.append(
            separator.join((each.where, f"{each.kind}.{each.used}", f"{each.distribution} {each.version}{why}"))
        )
    return lines


def _git() -> dict[str, object] | None:
    """The commit of the working directory and whether it has changes; None outside of a git tree."""
    git = shutil.which("git")
    if git is None:
        return None
    commit = subprocess.run([git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if commit.returncode:
        return None
    status = subprocess.run([git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}
