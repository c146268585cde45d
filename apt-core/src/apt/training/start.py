"""Where a run starts: anew, from a checkpoint of its own (resume), or from one of another run (branch).

A resume goes on with the same model and the same text; a branch may change whatever the weights still fit: plugins and
schedules, experts where the trunk was dense, the learning rate, the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from apt.core.config import APTConfig
from apt.core.profile import read_resolved
from apt.core.schedules import Schedule
from apt.errors import CheckpointError, UserError
from apt.hookspecs import RunState
from apt.modeling.parts import find_parts
from apt.training.changes import BRANCH, RESUME, check_changes
from apt.training.checkpoint import (
    MANIFEST,
    PROFILE,
    WEIGHTS,
    digest_of,
    find_checkpoint,
    holds_checkpoints,
    list_checkpoints,
    list_damaged,
    list_wrong,
    read_saved,
    read_step,
    verify,
)
from apt.training.tensors import model_tensors, saved_shapes


@dataclass(frozen=True)
class Parent:
    """What a branch grew from, as its record says it."""

    run: str
    checkpoint: str
    step: int
    manifest_sha256: str
    changes: tuple[str, ...]

    @classmethod
    def of(cls, checkpoint: Path, step: int, changes: Iterable[str]) -> Parent:
        """That of a run which begins at this checkpoint, which was saved at `step`, with these changes in words."""
        manifest = digest_of(checkpoint / MANIFEST)
        return cls(str(checkpoint.parent), checkpoint.name, step, manifest, tuple(changes))

    def to_dict(self) -> dict[str, object]:
        """As JSON values."""
        return {**asdict(self), "changes": list(self.changes)}


@dataclass(frozen=True)
class Start:
    """A checkpoint, or none, and whether it is another run's. `changes` are what the profile says otherwise since."""

    checkpoint: Path | None = None
    is_branch: bool = False
    changes: tuple[str, ...] = ()

    @classmethod
    def find(cls, config: APTConfig, out: Path, resume: str, branch: Path | None) -> Start:
        """Where the run in `out` starts. Raises `UserError` and its kin where it cannot."""
        if out.exists() and not out.is_dir():
            raise UserError(f"{out}: is a file; give a folder as --out")
        folder: Path | None = None
        if branch is not None or resume == "never":
            if out.is_dir() and any(out.iterdir()):
                raise UserError(f"{out}: is not empty; give another --out, or train with --resume auto to go on there")
            folder = branch
        elif resume != "auto" or holds_checkpoints(out):
            folder = find_checkpoint(out if resume == "auto" else Path(resume))
        if folder is None:
            return cls()
        verify(folder)
        read_saved(folder)
        # Before anything is built, since what may not change might not fit either.
        saved = read_resolved(folder / PROFILE).config
        changes = check_changes(folder, saved, config, BRANCH if branch is not None else RESUME)
        return cls(folder, branch is not None, tuple(changes))

    @property
    def is_new(self) -> bool:
        """Whether this is the beginning of a run, on a trunk or without."""
        return self.checkpoint is None or self.is_branch

    @property
    def parent(self) -> dict[str, object] | None:
        """What is recorded of the run that this one is a branch of; a resumed branch remembers it."""
        if self.checkpoint is None:
            return None
        saved = read_saved(self.checkpoint)
        if not self.is_branch:
            parent: dict[str, object] | None = saved["progress"].get("parent")
            return parent
        return Parent.of(self.checkpoint, int(saved["step"]), self.changes).to_dict()


def find_step(run: Path, step: int | None) -> Path:
    """The whole checkpoint of a run that was saved at `step`, or its newest.

    Raises `CheckpointError` where it is damaged, or is not there, with those that are.
    """
    if step is None:
        folder = find_checkpoint(run)
    else:
        folders = {read_step(each): each for each in list_checkpoints(run)}
        if step not in folders:
            there = ", ".join(map(str, folders)) or "none"
            lost = [*list_damaged(run), *(each for each in folders.values() if list_wrong(each))]
            damaged = f"; damaged: {', '.join(map(str, lost))}" if lost else ""
            raise CheckpointError(
                f"{run}: has no checkpoint of step {step}; it has: {there}{damaged}. "
                "training.keep_last and save_every say which are kept"
            )
        folder = folders[step]
    verify(folder)
    return folder


def check_phase(folder: Path, state: RunState, config: APTConfig) -> None:
    """Raise `CheckpointError` where something that was on at the checkpoint is not on in this profile."""
    on = Schedule(config).list_enabled_plugins(config.plugins, state.epoch, state.step)
    for plugin in state.plugins_on:
        if plugin not in on:
            raise CheckpointError(
                f"{folder}: {plugin!r} was on at step {state.step}, and what is on cannot be switched off; list it in plugins, "
                f"with its switch at step {state.step} or before, or start from an earlier checkpoint"
            )


def match_names(folder: Path, model: nn.Module) -> dict[str, str]:
    """Under which names a trunk's checkpoint has the weights of a branch's model, where they differ; ``""``: nowhere.

    Parts that are off may be new: what of them is idle keeps its first values. What runs in such a part while it is off took the
    trunk's place: experts in ``ffn`` keep the dense layer as ``ffn.dense``, which a trunk without experts has as ``ffn``.
    """
    saved = saved_shapes(folder / WEIGHTS)
    missing = [name for name in model_tensors(model) if name not in saved]
    names: dict[str, str] = {}
    for part in find_parts(model):
        if part.provider.switched_by is None or getattr(part.module, "active", True):
            continue
        say = getattr(part.module, "idle", None)
        idle = set(say()) if callable(say) else {part.module}
        names |= _names_in(part.path, part.module, idle, missing, saved)
    return names


def _names_in(
    path: str, module: nn.Module, idle: set[nn.Module], missing: list[str], saved: Mapping[str, object]
) -> dict[str, str]:
    """The missing names of one part that is off."""
    names: dict[str, str] = {}
    for name in missing:
        if not name.startswith(f"{path}."):
            continue
        child, dot, rest = name.removeprefix(f"{path}.").partition(".")
        if module in idle or not dot or module.get_submodule(child) in idle:
            names[name] = ""
        elif f"{path}.{rest}" in saved:
            names[name] = f"{path}.{rest}"
    return names
