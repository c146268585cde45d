"""What a run takes over from the checkpoint that it goes on from, beside weights and optimizer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apt.core.config import APTConfig
from apt.core.lock import Lock, check_lock, make_lock
from apt.core.resolve import Resolved
from apt.errors import CheckpointError
from apt.modeling.parts import set_active
from apt.training.assembly import Assembly
from apt.training.checkpoint import IMPORTED, read_saved, read_state
from apt.training.place import find_place
from apt.training.start import Start, check_phase, match_names


@dataclass(frozen=True)
class Taken:
    """What was taken over; the defaults are those of a run that begins anew."""

    left_out: int = 0
    """Steps' worth of text that its place is ahead of the step: read and left out, since a number was not finite there."""
    metrics: int = 0
    """Bytes of `metrics.jsonl` that it goes on from."""
    best: float | None = None
    """The lowest held-out loss of its checkpoints."""
    names: dict[str, str] | None = None
    """What a branch's parent calls the parameters whose names differ."""
    calibration: Mapping[str, Any] | None = None
    """How products were computed."""
    journal: Mapping[str, Any] = field(default_factory=dict)
    """What the journal had saved."""


def take_over(
    folder: Path,
    start: Start,
    config: APTConfig,
    resolved: Resolved,
    parts: Assembly,
    *,
    strict_lock: bool,
    warn: Callable[[str], None],
) -> Taken:
    """From this run's checkpoint, or its parent's. A branch's model has what was on there switched on.

    Raises `CheckpointError` where the run cannot go on with it; `warn` is told what is different since.
    """
    for line in start.changes:
        warn(f"the profile has changed since {folder.name}: {line}")
    saved = read_saved(folder)
    if saved["corpus"] not in (IMPORTED, parts.corpus.digest):
        what = f"{folder}: was trained on another text than data.source gives now"
        if not start.is_branch:
            raise CheckpointError(what)
        warn(f"{what}; what is held out now may have been learnt then")
    faults = check_lock(Lock.from_dict(saved["lock"]), make_lock(resolved), strict=strict_lock)
    for fault in faults:
        warn(f"{folder.name}: {fault}")
    state, progress = read_state(saved), saved["progress"]
    if state.step > parts.max_steps or (state.step == parts.max_steps and not start.lacks_card):
        raise CheckpointError(f"{folder}: step {state.step} is the end of this profile; raise max_epochs or max_steps")
    check_phase(folder, state, config)
    if not faults and start.has_same_parts:  # other code has proven nothing
        # A step that is watched runs eagerly, and so to other bits than a compiled one.
        parts.proof.take_over(progress.get("proven", ()))
    assert start.before is not None
    left_out, moved = find_place(folder, saved, start.before, config, parts)
    if not start.is_branch:
        return Taken(
            left_out=left_out,
            metrics=progress.get("metrics", sys.maxsize),
            best=progress["best"] if start.best is not None else None,
            calibration=progress.get("calibration"),
            journal=progress,
        )
    if moved is not None:
        warn(f"{folder.name}: {moved}")
    for plugin in state.plugins_on:
        set_active(parts.model, plugin, True)
    return Taken(left_out, names=match_names(folder, parts.model), calibration=progress.get("calibration"))
