"""Where a run starts: anew, from a checkpoint of its own (resume), or from one of another run (branch).

A resume goes on with the same model and the same text; a branch may change whatever the weights still fit: plugins and
schedules, experts where the trunk was dense, the learning rate, the text.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
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
    BEST,
    LATEST,
    MANIFEST,
    PROFILE,
    WEIGHTS,
    digest_of,
    find_checkpoint,
    holds_checkpoints,
    list_checkpoints,
    list_damaged,
    list_wrong,
    pointer_fault,
    read_pointer,
    read_saved,
    read_step,
    step_of,
    verify,
)
from apt.training.holding import is_empty
from apt.training.record import CARD, METRICS, RECORD
from apt.training.snapshot import clear_unfinished, point
from apt.training.tensors import model_tensors, saved_shapes

ASIDE = "set-aside"
"""Where the checkpoints of a course that was left lie, in the run's folder."""


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
    """A checkpoint, or none, and whose it is. `changes` are what the profile says otherwise since."""

    checkpoint: Path | None = None
    is_branch: bool = False
    is_moved: bool = False
    """Whether a run goes on in another folder than its own."""
    changes: tuple[str, ...] = ()
    before: APTConfig | None = None
    """The profile that the checkpoint was saved with."""

    @classmethod
    def find(cls, config: APTConfig, out: Path, resume: str, branch: Path | None) -> Start:
        """Where the run in `out` starts. Raises `UserError` and its kin where it cannot."""
        folder: Path | None = None
        if branch is not None or resume == "never":
            if not is_empty(out):
                raise UserError(f"{out}: is not empty; give another --out, or train with --resume auto to go on there")
            folder = branch
        elif resume != "auto" or holds_checkpoints(out):
            folder = find_checkpoint(out if resume == "auto" else Path(resume))
        if folder is None:
            _require_no_parent(out)
            return cls()
        is_moved = branch is None and folder.resolve().parent != out.resolve()
        if is_moved and not is_empty(out):
            raise UserError(
                f"{out}: is not empty, and is not the run of {folder}; give a new folder as --out, "
                f"or {folder.parent} to go on there"
            )
        verify(folder)
        read_saved(folder)
        # Before anything is built, since what may not change might not fit either.
        saved = read_resolved(folder / PROFILE).config
        changes = check_changes(folder, saved, config, BRANCH if branch is not None else RESUME)
        return cls(folder, branch is not None, is_moved, tuple(changes), saved)

    @property
    def has_same_parts(self) -> bool:
        """Whether nothing is said otherwise of what the model is made of; only a branch may."""
        return not (self.is_branch and any(each.startswith(("model", "plugins")) for each in self.changes))

    @cached_property
    def best(self) -> Path | None:
        """The best checkpoint so far of the course that a run goes on with, where it is known and still in its folder.

        It is the one that `best` names. That may be damaged, or lie behind: a kill may have come before it was written, or
        another course have had a better one. Then it is the one that says so itself, of the loss that the run is held against.
        """
        if self._own is None:
            return None
        own = self._own.resolve()
        named, loss = read_pointer(own.parent / BEST), _best_loss(own)[0]
        course = [each for each in list_checkpoints(own.parent) if step_of(each) <= step_of(own)]
        told = {each: (_best_loss(each) == (loss, True), each.name == named) for each in course}
        return max((each for each in course if any(told[each])), key=told.__getitem__, default=None)

    @property
    def _own(self) -> Path | None:
        """The checkpoint of a run that goes on in its own folder."""
        return None if self.is_branch or self.is_moved else self.checkpoint

    @property
    def is_new(self) -> bool:
        """Whether this is the beginning of a run, on a trunk or without."""
        return self.checkpoint is None or self.is_branch

    @property
    def lacks_card(self) -> bool:
        """Whether a run goes on that was killed, were it after its last step: the card is what it writes last."""
        return self._own is not None and not (self._own.resolve().parent / CARD).is_file()

    @property
    def parent(self) -> dict[str, object] | None:
        """What is recorded of the run that this one began in; a resumed branch remembers it."""
        if self.checkpoint is None:
            return None
        saved = read_saved(self.checkpoint)
        if self._own is not None:
            parent: dict[str, object] | None = saved["progress"].get("parent")
            return parent
        return Parent.of(self.checkpoint, int(saved["step"]), self.changes).to_dict()

    def take_up(self, out: Path) -> list[str]:
        """Let `latest` name the checkpoint that a run goes on from, and set later ones aside; what was done, in words.

        A run has one past: without this, `--resume auto` and going back after a number that is not finite would take up the
        checkpoints of a course that was left. What a kill left unfinished goes.
        """
        clear_unfinished(out)
        if self._own is None:
            return []
        folder, best, pointer = self._own.resolve(), self.best, out / BEST
        point(out, LATEST, folder)
        told = []
        if pointer.is_file() and (fault := pointer_fault(pointer)):
            known = "is chosen anew, from the next that is saved" if best is None else f"so far is {best.name}"
            told.append(f"{pointer}: {fault}; the best checkpoint {known}")
        step = int(read_saved(folder)["step"])
        later = [each for each in (*list_checkpoints(out), *list_damaged(out)) if step_of(each) > step]
        if later:
            aside = next(each for each in map(out.joinpath, _names_aside()) if not each.exists())
            aside.mkdir()
            if read_pointer(pointer) in {each.name for each in later}:
                pointer.rename(aside / BEST)
            if (out / METRICS).is_file():
                shutil.copyfile(out / METRICS, aside / METRICS)
            for each in later:
                each.rename(aside / each.name)
            names = ", ".join(each.name for each in later)
            told.append(f"the later checkpoints of this run are set aside, with its metrics, in {aside}: {names}")
        if best is not None:
            point(out, BEST, best)
        return told


def _best_loss(folder: Path) -> tuple[float | None, bool]:
    """The lowest held-out loss that a checkpoint knows of, and whether it is its own."""
    try:
        progress = read_saved(folder)["progress"]
    except CheckpointError:
        return None, False
    return progress.get("best"), bool(progress.get("is_best"))


def _names_aside() -> Iterator[str]:
    yield ASIDE
    yield from (f"{ASIDE}-{number}" for number in itertools.count(2))


def _require_no_parent(out: Path) -> None:
    """Raise `UserError` where a run began in another and was stopped before it saved: anew it would be another run."""
    try:
        parent = json.loads((out / RECORD).read_text())["parent"]
        began_at = None if parent is None else Path(parent["run"]) / parent["checkpoint"]
    except FileNotFoundError:
        return  # it was stopped before it had written down what it is: nothing is lost
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{out / RECORD}: damaged ({type(error).__name__}: {error}), so that it is not known whether this run, which has "
            "saved nothing, began in another; give a new folder as --out, or remove this one"
        ) from error
    if began_at is not None:
        raise UserError(
            f"{out}: began at {began_at} and was stopped before its first checkpoint; "
            "start it again from there, in a new folder"
        )


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
                f"with its switch (schedules.enable_{plugin}_at_step) at step {state.step} or before, "
                "or start from an earlier checkpoint"
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
