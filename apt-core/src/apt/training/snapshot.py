"""A checkpoint is written: to a temporary folder, flushed to the disk, renamed, and only then does `latest` point to it.

A crash at any moment leaves the one before. A manifest holds a digest of each file. Nothing is pickled. Where a model is split
over ranks each writes its part (`apt.training.tensors`).
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from apt.core.config import APTConfig
from apt.core.local import code_of, kept_name
from apt.core.lock import make_lock
from apt.core.profile import dump_resolved
from apt.core.providers import Tokenizer
from apt.core.resolution import record_of
from apt.core.resolve import Resolved
from apt.errors import CheckpointError, PluginError
from apt.hookspecs import RunState
from apt.layers.sharded import local
from apt.training.checkpoint import (
    BEST,
    EXTRA,
    FORMAT,
    HOOKS,
    LATEST,
    MANIFEST,
    OPTIMIZER,
    PROFILE,
    STATE,
    WEIGHTS,
    digest_of,
    read_pointer,
)
from apt.training.durable import flush, write_at_once
from apt.training.randoms import RandomState, name_tensors
from apt.training.ranks import ALONE, Ranks
from apt.training.tensors import (
    PARTS,
    copied,
    model_tensors,
    optimizer_tensors,
    split_apart,
    write_parts,
    write_whole,
)

T = TypeVar("T")

WRITTEN = re.compile(r"step-\d{6,}(\.\d+)?")
"""What the folders of checkpoints are called."""
UNFINISHED = ".part"
"""How the name of one ends that is being written; it is hidden, too."""
REMOVED = f".removed{UNFINISHED}"
"""The same of one that is being removed."""


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint in memory: what is written later is what was then."""

    step: int
    texts: Mapping[str, str | bytes]
    tensors: Mapping[str, Mapping[str, Tensor]]
    """By file, what this rank holds whole; rank 0 writes it."""
    tokenizer: Tokenizer
    parts: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """By file, what is split over the ranks; each writes what it holds."""

    def num_bytes(self, ranks: Ranks = ALONE) -> int:
        """About what it takes on the disk, all ranks together."""
        whole, mine = (
            sum(local(tensor).nbytes for each in group.values() for tensor in each.values())
            for group in (self.tensors, self.parts)
        )
        return whole + sum(ranks.gather(mine)) + 2**20


def take_snapshot(
    *,
    config: APTConfig,
    resolved: Resolved,
    model: nn.Module,
    optimizer: Optimizer,
    tokenizer: Tokenizer,
    state: RunState,
    hooks: Mapping[str, Mapping[str, object]],
    corpus_digest: str,
    progress: Mapping[str, object],
    randoms: Sequence[RandomState],
    copy: bool,
) -> Snapshot:
    """Everything that a resume needs. With `copy` nothing that training changes later changes the snapshot.

    `progress` is what the trainer itself wants to find again, as JSON values; `randoms` has the states of each rank.
    """
    plain, extra = _split(hooks)
    extra |= name_tensors(randoms)
    weights, (moments, numbers) = model_tensors(model), optimizer_tensors(model, optimizer)
    saved = {
        "format": FORMAT,
        "step": state.step,
        "epoch": state.epoch,
        "max_steps": state.max_steps,
        "max_epochs": state.max_epochs,
        "plugins_on": list(state.plugins_on),
        "values": dict(state.values),
        "progress": dict(progress),
        "hooks": plain,
        "optimizer": numbers,
        "random": [dict(each.plain) for each in randoms],
        "corpus": corpus_digest,
        "lock": make_lock(resolved).to_dict(),
    }
    texts: dict[str, str | bytes] = {PROFILE: dump_resolved(config, resolved), STATE: json.dumps(saved, indent=1)}
    texts |= local_code(resolved)
    if copy:
        weights, moments, extra = copied(weights), copied(moments), copied(extra)
    whole, parts = {}, {}
    for file, tensors in ((WEIGHTS, weights), (OPTIMIZER, moments), (EXTRA, extra)):
        whole[file], split = split_apart(tensors)
        if split:
            parts[file] = split
    return Snapshot(state.step, texts, whole, tokenizer, parts)


def local_code(resolved: Resolved) -> dict[str, bytes]:
    """The code in files that a run uses, by the name that a copy of it has beside the run's profile."""
    records = (record_of(resolution.provider) for resolution in resolved.resolutions)
    return {kept_name(record.name): code_of(record) for record in records if record.sha256}


def write_snapshot(run: Path, snapshot: Snapshot, ranks: Ranks = ALONE) -> Path:
    """Write ``step-NNNNNN`` below `run`, whole or not at all, and point `latest` to it.

    Where there is one already, as in a run that went back, the new one has a name of its own (``step-NNNNNN.2``) until
    the end, and the old one is removed when `latest` points to the new one, and `best` where it named the old one.

    Where the snapshot has parts, all `ranks` call it, on one file system. Raises `CheckpointError`, on all of them, where the
    disk has no room or refuses; what was saved before is untouched then.
    """
    name = f"step-{snapshot.step:06d}"
    taken = [path for path in run.glob(f"{name}*") if WRITTEN.fullmatch(path.name) and path.is_dir()]
    names = itertools.chain([name], (f"{name}.{number}" for number in itertools.count(2)))
    folder = next(run / each for each in names if run / each not in taken)
    temporary = run / f".{folder.name}{UNFINISHED}"
    needed = snapshot.num_bytes(ranks)

    def write() -> None:
        if ranks.is_main:
            _require_room(folder, needed)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            for name, text in snapshot.texts.items():
                (temporary / name).write_bytes(text if isinstance(text, bytes) else text.encode())
            for name, tensors in snapshot.tensors.items():
                write_whole(temporary / name, tensors)
            snapshot.tokenizer.save(temporary)

    def seal() -> dict[str, str]:
        mine = sorted(path for path in temporary.rglob("*") if path.is_file() and _writer(path) == ranks.rank)
        digests = {path.relative_to(temporary).as_posix(): digest_of(path) for path in mine}
        for path in mine:
            flush(path)
        return digests

    def finish() -> None:
        if ranks.is_main:
            (temporary / MANIFEST).write_text(json.dumps(dict(sorted(digests.items())), indent=1))
            flush(temporary / MANIFEST)
            for inner in (*(path for path in temporary.rglob("*") if path.is_dir()), temporary):
                flush(inner)
            temporary.rename(folder)
            flush(run)
            point(run, LATEST, folder)
            for old in taken:
                if old.name == read_pointer(run / BEST):  # it holds the same step of the same course
                    point(run, BEST, folder)
                remove(old)

    stages = _Stages(folder, temporary, ranks)
    stages.do(write)
    for file, split in snapshot.parts.items():
        stages.do(lambda file=file, split=split: write_parts(temporary / file, split, ranks))  # type: ignore[misc]
    digests: dict[str, str] = {}
    for found in ranks.gather(stages.do(seal)):
        digests |= found
    stages.do(finish)
    return folder


class _Stages:
    """The stages of writing one checkpoint: where one fails on any rank, it has failed on all."""

    def __init__(self, folder: Path, temporary: Path, ranks: Ranks) -> None:
        self.folder, self.temporary, self.ranks = folder, temporary, ranks

    def do(self, stage: Callable[[], T]) -> T:
        """One stage. Raises `CheckpointError`."""
        error: BaseException | None = None
        fault = ""
        try:
            result = stage()
        except CheckpointError as told:
            error, fault = told, str(told)
        except OSError as told:
            error, fault = told, told.strerror or str(told)
        except SafetensorError as told:
            error, fault = told, str(told)
        faults = [each for each in self.ranks.gather(fault) if each]
        if faults:
            if self.ranks.is_main:
                shutil.rmtree(self.temporary, ignore_errors=True)
            if isinstance(error, CheckpointError):
                raise error
            raise CheckpointError(
                f"{self.folder}: cannot be written: {'; '.join(dict.fromkeys(faults))}; what was saved before is untouched"
            ) from error
        return result


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise CheckpointError(
            f"{folder}: needs {needed / 2**20:.2f} MiB, and {free / 2**20:.2f} MiB are free; make room and go on; "
            "what was saved before is untouched"
        )


def _writer(path: Path) -> int:
    """The rank that wrote a file: those of parts are numbered from 1 on."""
    return int(path.name.split("-")[1]) - 1 if path.parent.suffix == PARTS else 0


def clear_unfinished(run: Path) -> None:
    """Remove what a run left behind that was killed while it wrote or removed; nobody does now."""
    for folder in run.glob(f".step-*{UNFINISHED}"):
        shutil.rmtree(folder, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove a checkpoint: at once for whoever looks for it, and what a kill leaves of it, `clear_unfinished` finds."""
    hidden = folder.with_name(f".{folder.name}{REMOVED}")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    flush(folder.parent)
    shutil.rmtree(hidden)


def point(run: Path, pointer: str, folder: Path) -> None:
    """Let the file `pointer` of a run name one of its checkpoints, at once or not at all."""
    write_at_once(run / pointer, folder.name + "\n")


def _split(hooks: Mapping[str, Mapping[str, object]]) -> tuple[dict[str, dict[str, object]], dict[str, Tensor]]:
    """What plugins save, as JSON values and tensors."""
    plain: dict[str, dict[str, object]] = {}
    tensors: dict[str, Tensor] = {}
    for plugin, values in hooks.items():
        plain[plugin] = {}
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{HOOKS}{plugin}/{key}"] = value.detach().clone()
            else:
                plain[plugin][key] = value
        try:
            json.dumps(plain[plugin])
        except (TypeError, ValueError) as error:
            what = f"plugin {plugin!r}: apt_checkpoint_save returned what is neither JSON nor a tensor: {error}"
            raise PluginError(what) from error
    return plain, tensors
