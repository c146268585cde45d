"""A checkpoint: a folder that holds the profile, the weights, the optimizer and everything that makes a resume exact.

It is written to a temporary folder, flushed to the disk, renamed, and only then does `latest` point to it; a crash at any moment
leaves the one before. A manifest holds a digest of each file, which is checked when it is read. Nothing is pickled. Where a model
is split over ranks each writes its part (`apt.training.tensors`); what any number of ranks wrote, any number reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from apt.core.config import APTConfig
from apt.core.local import code_of, kept_name
from apt.core.lock import Lock, check_lock, make_lock
from apt.core.profile import dump_resolved, read_resolved
from apt.core.providers import Tokenizer, TokenizerProvider
from apt.core.resolution import record_of
from apt.core.resolve import Resolved, resolve_config
from apt.core.special import SpecialIds
from apt.errors import CheckpointError, LockWarning
from apt.hookspecs import RunState
from apt.layers.sharded import local
from apt.modeling.compose import ModelBuilder
from apt.modeling.model import Decoder
from apt.modeling.parts import set_active
from apt.training.randoms import RandomState, find_state, name_tensors
from apt.training.ranks import ALONE, Ranks
from apt.training.tensors import (
    PARTS,
    copied,
    model_tensors,
    optimizer_tensors,
    read_into,
    saved_shapes,
    split_apart,
    write_parts,
    write_whole,
)

T = TypeVar("T")

PROFILE, WEIGHTS, OPTIMIZER, EXTRA, STATE = (
    "resolved.yaml",
    "model.safetensors",
    "optimizer.safetensors",
    "extra.safetensors",
    "state.json",
)
MANIFEST, LATEST, BEST = "manifest.json", "latest", "best"
FORMAT = 2
"""Raised when older checkpoints can no longer be read."""
IMPORTED = ""
"""The digest of the corpus of a model that was trained elsewhere: what it has read is not known."""


@dataclass(frozen=True)
class LoadedRun:
    """A trained model and all that belongs to it."""

    config: APTConfig
    model: Decoder
    tokenizer: Tokenizer
    state: RunState
    resolved: Resolved
    folder: Path
    corpus_digest: str

    @property
    def special(self) -> SpecialIds:
        """What starts and ends its texts."""
        return SpecialIds.of(self.config, self.resolved)


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
    for resolution in resolved.resolutions:
        record = record_of(resolution.provider)
        if record.sha256:
            texts[kept_name(record.name)] = code_of(record)
    if copy:
        weights, moments = copied(weights), copied(moments)
    whole, parts = {EXTRA: extra}, {}
    for file, tensors in ((WEIGHTS, weights), (OPTIMIZER, moments)):
        whole[file], split = split_apart(tensors)
        if split:
            parts[file] = split
    return Snapshot(state.step, texts, whole, tokenizer, parts)


def write_snapshot(run: Path, snapshot: Snapshot, ranks: Ranks = ALONE) -> Path:
    """Write ``step-NNNNNN`` below `run`, whole or not at all, and point `latest` to it.

    Where the snapshot has parts, all `ranks` call it, on one file system. Raises `CheckpointError`, on all of them, where the
    disk has no room or refuses; what was saved before is untouched then.
    """
    folder = run / f"step-{snapshot.step:06d}"
    temporary = run / f".{folder.name}.part"
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
        digests = {path.relative_to(temporary).as_posix(): _digest(path) for path in mine}
        for path in mine:
            _flush(path)
        return digests

    def finish() -> None:
        if ranks.is_main:
            (temporary / MANIFEST).write_text(json.dumps(dict(sorted(digests.items())), indent=1))
            _flush(temporary / MANIFEST)
            for inner in (*(path for path in temporary.rglob("*") if path.is_dir()), temporary):
                _flush(inner)
            if folder.exists():
                shutil.rmtree(folder)
            temporary.rename(folder)
            _flush(run)
            point(run, LATEST, folder)

    stages = _Stages(folder, temporary, ranks)
    stages.do(write)
    for name, split in snapshot.parts.items():
        stages.do(lambda name=name, split=split: write_parts(temporary / name, split, ranks))  # type: ignore[misc]
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
            f"{folder}: needs {needed / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB are free; make room and go on "
            f"with --resume auto --out {folder.parent}; what was saved before is untouched"
        )


def _writer(path: Path) -> int:
    """The rank that wrote a file: those of parts are numbered from 1 on."""
    return int(path.name.split("-")[1]) - 1 if path.parent.suffix == PARTS else 0


def point(run: Path, pointer: str, folder: Path) -> None:
    """Let the file `pointer` of a run name one of its checkpoints, at once or not at all."""
    temporary = run / f".{pointer}.part"
    temporary.write_text(folder.name + "\n")
    _flush(temporary)
    temporary.replace(run / pointer)
    _flush(run)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a run's folder or a checkpoint's folder means. Raises `CheckpointError`.

    A run that died between writing a checkpoint and pointing to it is taken by its newest whole checkpoint.
    """
    if (path / MANIFEST).is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such folder")
    pointer = path / LATEST
    if pointer.is_file():
        folder = path / pointer.read_text().strip()
        if (folder / MANIFEST).is_file():
            return folder
    whole = list_checkpoints(path)
    if not whole:
        raise CheckpointError(f"{path}: holds no checkpoint")
    return whole[-1]


def list_checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, by the step that each of them says it holds."""
    steps: dict[Path, int] = {}
    for manifest in run.glob(f"*/{MANIFEST}"):
        if not manifest.parent.name.startswith("."):
            try:
                steps[manifest.parent] = int(json.loads((manifest.parent / STATE).read_text())["step"])
            except (OSError, ValueError, KeyError, TypeError):
                continue  # damaged: `verify` names it where it is asked for
    return sorted(steps, key=lambda folder: steps[folder])


def verify(folder: Path) -> None:
    """Compare every file with its digest. Raises `CheckpointError` naming what is damaged, and the checkpoint before."""
    try:
        digests = json.loads((folder / MANIFEST).read_text())
        wrong = [name for name, digest in digests.items() if _digest(folder / name) != digest]
    except (OSError, ValueError) as error:
        wrong = [str(error)]
    if wrong:
        before = [each for each in list_checkpoints(folder.parent) if each.name < folder.name]
        hint = f"use the one before, {before[-1]}" if before else "there is none before it"
        raise CheckpointError(f"{folder}: damaged ({', '.join(wrong)}); {hint}")


def load_run(path: Path | str, *, allow_local_code: bool = False, strict_lock: bool = False) -> LoadedRun:
    """The model of a run or checkpoint, on the CPU, in evaluation mode, with what was switched on.

    Where its providers are not those that made it, a `LockWarning` says in what; with `strict_lock` that is an error.
    Raises `CheckpointError` where it is missing or damaged, `ProfileError` where its providers cannot be had.
    """
    folder = find_checkpoint(Path(path))
    verify(folder)
    saved = read_saved(folder)
    config = read_resolved(folder / PROFILE, allow_local_code=allow_local_code).config
    resolved = resolve_config(config)
    for fault in check_lock(Lock.from_dict(saved["lock"]), make_lock(resolved), strict=strict_lock):
        warnings.warn(f"{folder}: {fault}", LockWarning, stacklevel=2)
    model = ModelBuilder(config, resolved=resolved).build_model()
    load_weights(folder, model)
    state = read_state(saved)
    for plugin in config.plugins:
        set_active(model, plugin, plugin in state.plugins_on)
    provider = resolved.providers["tokenizer"]
    assert isinstance(provider, TokenizerProvider)
    tokenizer = provider.load(folder)
    return LoadedRun(config, model.eval(), tokenizer, state, resolved, folder, saved["corpus"])


def read_state(saved: Mapping[str, object]) -> RunState:
    """Where the run stood."""
    names = ("step", "epoch", "max_steps", "max_epochs", "values")
    return RunState(**{name: saved[name] for name in names}, plugins_on=tuple(saved["plugins_on"]))  # type: ignore[arg-type]


def load_weights(folder: Path, model: nn.Module, names: Mapping[str, str] | None = None) -> None:
    """Put the weights in place; names and shapes must agree. Raises `CheckpointError`.

    `names` says under which other names the checkpoint has some of them; a name that it maps to ``""`` is not read.
    """
    path, own = folder / WEIGHTS, model_tensors(model)
    saved = saved_shapes(path)
    wanted = {(names or {}).get(name, name): tensor for name, tensor in own.items()}
    wanted.pop("", None)
    faults = [f"{name} is missing" for name in wanted.keys() - saved.keys()]
    faults += [f"the model has no {name}" for name in saved.keys() - wanted.keys()]
    faults += [
        f"{name} is {list(saved[name])}, the model's is {list(wanted[name].shape)}"
        for name in saved.keys() & wanted.keys()
        if saved[name] != tuple(wanted[name].shape)
    ]
    if faults:
        raise CheckpointError(f"{folder}: its weights do not fit the profile's model: {_listed(faults)}")
    read_into(path, wanted)


def read_saved(folder: Path) -> dict[str, Any]:
    """The plain part of a checkpoint. Raises `CheckpointError` for one of another format."""
    saved: dict[str, Any] = json.loads((folder / STATE).read_text())
    if saved["format"] != FORMAT:
        raise CheckpointError(
            f"{folder}: has format {saved['format']}, and this version of apt-core reads format {FORMAT}; "
            "use the version that wrote it"
        )
    return saved


def restore(
    folder: Path, model: nn.Module, optimizer: Optimizer, names: Mapping[str, str] | None = None
) -> tuple[RunState, dict[str, dict[str, object]], list[str]]:
    """Put weights and optimizer in place, for going on.

    Returns where the run stood, what its plugins had saved, and the parameters of which the optimizer remembers nothing: only
    with `names` (see `load_weights`) may there be any.
    """
    saved = read_saved(folder)
    load_weights(folder, model, names)
    path, numbers = folder / OPTIMIZER, saved["optimizer"]
    shapes = saved_shapes(path)
    wanted: dict[str, Tensor] = {}
    fresh: list[str] = []
    for name, parameter in model.named_parameters():
        source = (names or {}).get(name, name)
        memory = optimizer.state[parameter]
        keys = {key: f"{source}/{key}" for key in memory}
        if not all(
            (tuple(memory[key].shape) == shapes.get(at)) if at in shapes else at in numbers for key, at in keys.items()
        ):
            fresh.append(name)
            continue
        for key, at in keys.items():
            if at in shapes:
                wanted[at] = memory[key]
            elif isinstance(memory[key], Tensor):
                memory[key].fill_(numbers[at])
            else:
                memory[key] = numbers[at]
    # An imported model comes without an optimizer: its memory stays that of the start.
    if fresh and names is None and saved["corpus"] != IMPORTED:
        raise CheckpointError(f"{folder}: holds no memory of the optimizer for {_listed(fresh)}")
    read_into(path, wanted)
    return read_state(saved), _joined(saved["hooks"], load_file(folder / EXTRA)), fresh


def restore_random(folder: Path, rank: int = 0) -> bool:
    """Put all random states in place: the last thing before the first step, so that nothing draws in between.

    Says whether the checkpoint holds any for this rank; one of fewer ranks does not.
    """
    state = find_state(read_saved(folder)["random"], load_file(folder / EXTRA), rank)
    if state is not None:
        state.restore()
    return state is not None


def _listed(words: Iterable[str], most: int = 5) -> str:
    ordered = sorted(words)
    return ", ".join(ordered[:most]) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")


def _split(hooks: Mapping[str, Mapping[str, object]]) -> tuple[dict[str, dict[str, object]], dict[str, Tensor]]:
    """What plugins save, as JSON values and tensors."""
    plain: dict[str, dict[str, object]] = {}
    tensors: dict[str, Tensor] = {}
    for plugin, values in hooks.items():
        plain[plugin] = {}
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"hooks.{plugin}/{key}"] = value.detach().clone()
            else:
                plain[plugin][key] = value
    return plain, tensors


def _joined(plain: Mapping[str, dict[str, object]], tensors: Mapping[str, Tensor]) -> dict[str, dict[str, object]]:
    hooks = {plugin: dict(values) for plugin, values in plain.items()}
    for name, tensor in tensors.items():
        if name.startswith("hooks."):
            plugin, _, key = name.removeprefix("hooks.").partition("/")
            hooks.setdefault(plugin, {})[key] = tensor
    return hooks


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
