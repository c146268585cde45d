"""The record of a run: a folder that describes itself, and `metrics.jsonl`, a line an event."""

from __future__ import annotations

import json
import math
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import TextIO

from apt.core.config import APTConfig
from apt.core.registry import Resolution
from apt.core.resolve import Resolved

METRICS, RECORD, CARD, PLOT = "metrics.jsonl", "record.json", "README.md", "loss.png"


class Metrics:
    """Appends events to `metrics.jsonl` in `folder` (none: nowhere, for ranks that do not write).

    What an interrupted run wrote beyond its checkpoint is cut off on resume.
    """

    def __init__(self, folder: Path | None, resumed_at: int | None) -> None:
        self._file = None if folder is None else self._open(folder, resumed_at)

    def _open(self, folder: Path, resumed_at: int | None) -> TextIO:
        path = folder / METRICS
        if resumed_at is not None and path.is_file():
            kept = [event for event in read_metrics(folder) if int(str(event.get("step", 0))) <= resumed_at]
            rewritten = path.with_suffix(".part")
            rewritten.write_text("".join(json.dumps(event) + "\n" for event in kept))
            rewritten.replace(path)
        return path.open("a" if resumed_at is not None else "w", buffering=1)

    def write(self, event: str, **values: object) -> None:
        """One line. A number that is not finite becomes null: JSON has no other way to say it."""
        if self._file is None:
            return
        plain = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        self._file.write(json.dumps({"event": event, **plain}) + "\n")

    def close(self) -> None:
        """No more events."""
        if self._file is not None:
            self._file.close()


def read_metrics(folder: Path) -> list[dict[str, object]]:
    """All events of a run; a last line that was cut off is left out."""
    events: list[dict[str, object]] = []
    for line in (folder / METRICS).read_text().splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def write_record(
    folder: Path,
    config: APTConfig,
    resolved: Resolved,
    corpus_digest: str,
    parameters: int,
    calibration: Mapping[str, object] | None = None,
    parent: Mapping[str, object] | None = None,
) -> None:
    """What the run was made of: providers asked for and used, how products are computed, its parent, where it ran."""
    wanted = {"apt-core", "torch", "numpy", "pydantic", "safetensors"} | {
        each.distribution for each in resolved.resolutions
    }
    versions = {each.metadata["Name"]: each.version for each in distributions() if each.metadata["Name"] in wanted}
    record = {
        "name": config.name,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "parent": parent,
        "parameters": parameters,
        "calibration": calibration,
        "corpus_sha256": corpus_digest,
        "providers": [resolution.to_dict() for resolution in resolved.resolutions],
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "distributions": dict(sorted(versions.items())),
        "git": _git(),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def write_card(folder: Path, config: APTConfig, resolved: Resolved, results: Mapping[str, object]) -> None:
    """The model card."""
    providers = "\n".join(f"| {line} |" for line in provider_lines(resolved.resolutions, " | "))
    numbers = "\n".join(f"- {name}: {value}" for name, value in results.items())
    (folder / CARD).write_text(
        f"# {config.name}\n\n{config.description or 'A model trained with apt-core.'}\n\n## Results\n\n{numbers}\n\n"
        f"## Providers\n\n| where | provider | distribution |\n| --- | --- | --- |\n{providers}\n\n"
        f"The loss over the run is in `{PLOT}`, every event in `{METRICS}`, the environment in `{RECORD}`; each checkpoint "
        "holds the whole profile. `apt-core generate` and `apt-core evaluate` take this folder.\n"
    )


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
