"""A checkpoint: a folder that holds the profile, the weights, the optimizer and everything that makes a resume exact.

Here it is found, checked and read; `apt.training.snapshot` writes it. Its manifest holds a digest of each file, which is compared
before any of it is used, and nothing in it is pickled. What any number of ranks wrote, any number reads.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
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
from apt.training.tensors import (
    model_tensors,
    read_into,
    saved_shapes,
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
        wrong = [name for name, digest in digests.items() if digest_of(folder / name) != digest]
    except (OSError, ValueError) as error:
        wrong = [str(error)]
    if wrong:
        ordered = list_checkpoints(folder.parent)
        before = ordered[: ordered.index(folder)] if folder in ordered else ordered
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


def _joined(plain: Mapping[str, dict[str, object]], tensors: Mapping[str, Tensor]) -> dict[str, dict[str, object]]:
    hooks = {plugin: dict(values) for plugin, values in plain.items()}
    for name, tensor in tensors.items():
        if name.startswith("hooks."):
            plugin, _, key = name.removeprefix("hooks.").partition("/")
            hooks.setdefault(plugin, {})[key] = tensor
    return hooks


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
