"""A checkpoint: a folder that holds the profile, the weights, the optimizer and everything that makes a resume exact.

Here it is found, checked and read; `apt.training.snapshot` writes it. Its manifest holds a digest of each file, which is compared
before any of it is used, and nothing in it is pickled. What any number of ranks wrote, any number reads.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from apt.core.config import APTConfig
from apt.core.lock import Lock, check_lock, make_lock
from apt.core.profile import read_resolved
from apt.core.providers import Tokenizer, TokenizerProvider
from apt.core.resolve import Resolved, resolve_config
from apt.core.special import SpecialIds
from apt.errors import CheckpointError, LockWarning
from apt.hookspecs import RunState
from apt.modeling.compose import ModelBuilder
from apt.modeling.model import Decoder
from apt.modeling.parts import set_active
from apt.training.randoms import find_state
from apt.training.tensors import model_tensors, read_all, read_into, saved_shapes

T = TypeVar("T")

PROFILE, WEIGHTS, OPTIMIZER, EXTRA, STATE = (
    "resolved.yaml",
    "model.safetensors",
    "optimizer.safetensors",
    "extra.safetensors",
    "state.json",
)
HOOKS = "hooks."
"""What the names of tensors begin with that a plugin saves, before its own name and a slash."""
OTHERS = "weights."
"""What the names of tensors begin with that a plugin saves as other weights of the model: see `apt.training.weights`."""
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


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a run's folder or a checkpoint's folder means. Raises `CheckpointError`, naming what is damaged.

    What `latest` names counts; a run that died before it first pointed to a checkpoint is taken by its newest whole one.
    """
    if not path.is_dir():
        what = "is a file; give a run's folder, or that of one of its checkpoints"
        raise CheckpointError(f"{path}: {what if path.exists() else 'there is no such folder'}")
    if is_checkpoint(path):
        return _with_manifest(path)
    pointer = path / LATEST
    if pointer.is_file():
        return _follow(pointer)
    if lost := list_damaged(path):
        raise _damaged(lost[-1], list_wrong(lost[-1]))
    whole = list_checkpoints(path)
    if not whole:
        raise CheckpointError(f"{path}: holds no checkpoint")
    return whole[-1]


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint, damaged or not, and not a run's."""
    return (path / MANIFEST).is_file() or (path / STATE).is_file()


def _with_manifest(folder: Path) -> Path:
    """The folder. Raises `CheckpointError` where its manifest is missing."""
    if not (folder / MANIFEST).is_file():
        raise _damaged(folder, [f"{MANIFEST} is missing"])
    return folder


def _follow(pointer: Path) -> Path:
    """The checkpoint that a pointer of a run names. Raises `CheckpointError` where there is none."""
    what = pointer_fault(pointer)
    if not what:
        return _with_manifest(pointer.parent / read_pointer(pointer))
    whole = list_checkpoints(pointer.parent)
    hint = (
        f"the newest whole one is {whole[-1]}; give it by its path (--resume {whole[-1]})"
        if whole
        else "nor is another"
    )
    raise CheckpointError(f"{pointer}: {what}; {hint}")


def read_pointer(pointer: Path) -> str:
    """The name that a pointer of a run holds; nothing where it is not there or not text."""
    try:
        return pointer.read_text(encoding="utf-8").strip()
    except (FileNotFoundError, ValueError):
        return ""


def pointer_fault(pointer: Path) -> str:
    """What is wrong with a pointer of a run, in words; nothing where it names a folder that is there."""
    name = read_pointer(pointer)
    if name and Path(name).name == name and (pointer.parent / name).is_dir():
        return ""
    return f"names {name!r}, which is not there" if name else "damaged: it names no checkpoint"


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run that can be read, by the step that each of them says it holds."""
    steps = {each: step for each in _list_folders(run) if (step := read_step(each)) is not None}
    return sorted(steps, key=lambda folder: (steps[folder], folder.name))


def list_damaged(run: Path) -> list[Path]:
    """What looks like a checkpoint of a run and cannot be read as one, by name."""
    return sorted(each for each in _list_folders(run) if read_step(each) is None)


def holds_checkpoints(run: Path) -> bool:
    """Whether a run has saved anything, damaged or not."""
    return (run / LATEST).is_file() or bool(_list_folders(run))


def _list_folders(run: Path) -> list[Path]:
    """What is, or was, a checkpoint of a run. A hidden folder is one that was never finished."""
    found = (each for each in run.glob("*") if each.is_dir() and not each.name.startswith("."))
    return [each for each in found if each.name.startswith("step-") or is_checkpoint(each)]


def read_step(folder: Path) -> int | None:
    """The step that a checkpoint says it holds; None where it is not whole enough to say so."""
    if not (folder / MANIFEST).is_file():
        return None
    try:
        return int(json.loads((folder / STATE).read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # whoever asks for the folder is told by `verify`


def _named_step(folder: Path) -> int | None:
    named = folder.name.removeprefix("step-").partition(".")[0]
    return int(named) if named.isdecimal() else None


def step_of(folder: Path) -> int:
    """The step that a checkpoint says it holds; where it cannot be read, that of its name, or -1."""
    step = read_step(folder)
    step = _named_step(folder) if step is None else step
    return -1 if step is None else step


def verify(folder: Path) -> None:
    """Compare every file with its digest. Raises `CheckpointError` naming what is damaged, and the checkpoint before."""
    if wrong := list_wrong(folder):
        raise _damaged(folder, wrong)


def list_wrong(folder: Path) -> list[str]:
    """The files that are not as the manifest says, or what is wrong with that."""
    try:
        digests = dict[str, str](json.loads((folder / MANIFEST).read_text()))
        return [name for name, digest in digests.items() if digest_of(folder / name) != digest]
    except FileNotFoundError as error:
        return [f"{Path(error.filename).name} is missing"]
    except (OSError, ValueError, TypeError) as error:
        return [f"{MANIFEST}: {error}"]


def _damaged(folder: Path, wrong: Iterable[str]) -> CheckpointError:
    """What is said of a damaged checkpoint: the whole one before it is offered, else those that there are."""
    step = _named_step(folder)  # a damaged file may say any
    step = read_step(folder) if step is None else step
    steps = {each: read_step(each) for each in list_checkpoints(folder.parent) if each != folder}
    before = [each for each, its in steps.items() if step is not None and its is not None and its < step]
    usable = next((each for each in reversed(before) if not list_wrong(each)), None)
    if usable is not None:
        hint = f"use the one before, {usable}"
    elif later := [str(each) for each in steps if each not in before and not list_wrong(each)]:
        hint = f"there is none before it; there are: {', '.join(later)}"
    else:
        hint = "there is none before it"
    return CheckpointError(f"{folder}: damaged ({', '.join(wrong)}); {hint}")


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
    state = read_state(saved)
    model = load_model(folder, config, resolved, state.plugins_on)
    provider = resolved.providers["tokenizer"]
    assert isinstance(provider, TokenizerProvider)
    tokenizer = provider.load(folder)
    return LoadedRun(config, model, tokenizer, state, resolved, folder, saved["corpus"])


def load_model(folder: Path, config: APTConfig, resolved: Resolved, plugins_on: Collection[str]) -> Decoder:
    """The model of a checkpoint in one piece, on the CPU, in evaluation mode, with what was switched on."""
    model = ModelBuilder(config, resolved=resolved).build_model()
    load_weights(folder, model)
    for plugin in config.plugins:
        set_active(model, plugin, plugin in plugins_on)
    return model.eval()


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
    """The plain part of a checkpoint. Raises `CheckpointError` for one that is damaged or of another format."""
    try:
        saved: dict[str, Any] = json.loads((folder / STATE).read_text())
        written = saved["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, [STATE]) from error
    if written != FORMAT:
        raise CheckpointError(
            f"{folder}: has format {written}, and this version of apt-core reads format {FORMAT}; "
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
    return read_state(saved), _read_hooks(folder, saved["hooks"], model, names or {}), fresh


def restore_random(folder: Path, rank: int = 0) -> bool:
    """Put all random states in place: the last thing before the first step, so that nothing draws in between.

    Says whether they are; a checkpoint of fewer ranks has none for this one, where that of an imported model needs none.
    """
    saved = read_saved(folder)["random"]
    state = find_state(saved, load_file(folder / EXTRA), rank)
    if state is not None:
        state.restore()
    return state is not None or not saved


def _listed(words: Iterable[str], most: int = 5) -> str:
    ordered = sorted(words)
    return ", ".join(ordered[:most]) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")


def _read_hooks(
    folder: Path, plain: Mapping[str, dict[str, object]], model: nn.Module, names: Mapping[str, str]
) -> dict[str, dict[str, object]]:
    """What plugins saved; other weights of the model (`apt.training.weights`) by the names that it has now, split as they are."""
    own = dict(model.named_parameters())
    now = {saved: name for name, saved in names.items() if saved}
    others = {key: (kind, now.get(saved, saved)) for key, kind, saved in list_others(saved_shapes(folder / EXTRA))}
    like = {key: own[parameter] for key, (_, parameter) in others.items() if parameter in own}
    hooks = {plugin: dict(values) for plugin, values in plain.items()}
    for key, tensor in read_all(folder / EXTRA, like).items():
        if key.startswith(HOOKS):
            plugin, _, name = key.removeprefix(HOOKS).partition("/")
            if key in others:
                name = OTHERS + ".".join(others[key])
            hooks.setdefault(plugin, {})[name] = tensor
    return hooks


def list_others(keys: Iterable[str]) -> list[tuple[str, str, str]]:
    """The keys in `EXTRA` of other weights that plugins saved, each with the name of the set and that of the parameter."""
    found = []
    for key in keys:
        _, _, saved = key.removeprefix(HOOKS).partition("/")
        if key.startswith(HOOKS) and saved.startswith(OTHERS):
            kind, _, parameter = saved.removeprefix(OTHERS).partition(".")
            found.append((key, kind, parameter))
    return found


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
