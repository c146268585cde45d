"""A checkpoint: a folder that holds the profile, the weights, the optimizer and everything that makes a resume exact.

It is written to a temporary folder, flushed to the disk, renamed, and only then does `latest` point to it; a crash at any moment
leaves the one before. A manifest holds a digest of each file, which is checked when it is read. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
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
from apt.errors import CheckpointError
from apt.hookspecs import RunState
from apt.modeling.compose import ModelBuilder
from apt.modeling.model import Decoder
from apt.modeling.parts import set_active

PROFILE, WEIGHTS, OPTIMIZER, EXTRA, STATE = (
    "resolved.yaml",
    "model.safetensors",
    "optimizer.safetensors",
    "extra.safetensors",
    "state.json",
)
MANIFEST, LATEST, BEST = "manifest.json", "latest", "best"
FORMAT = 1
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
    tokenizer: Tokenizer

    @property
    def num_bytes(self) -> int:
        """About what it takes on the disk."""
        return sum(tensor.nbytes for each in self.tensors.values() for tensor in each.values()) + 2**20


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
    for rank, each in enumerate(randoms):
        extra |= {f"random.{name}.{rank}": tensor for name, tensor in each.tensors.items()}
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
        "random": [each.plain for each in randoms],
        "corpus": corpus_digest,
        "lock": make_lock(resolved).to_dict(),
    }
    texts: dict[str, str | bytes] = {PROFILE: dump_resolved(config, resolved), STATE: json.dumps(saved, indent=1)}
    for resolution in resolved.resolutions:
        record = record_of(resolution.provider)
        if record.sha256:
            texts[kept_name(record.name)] = code_of(record)
    weights, moments = _distinct(model.state_dict()), _optimizer_tensors(model, optimizer)
    if copy:
        weights, moments = ({key: value.cpu().clone() for key, value in each.items()} for each in (weights, moments))
    return Snapshot(state.step, texts, {WEIGHTS: weights, OPTIMIZER: moments, EXTRA: extra}, tokenizer)


def write_snapshot(run: Path, snapshot: Snapshot) -> Path:
    """Write ``step-NNNNNN`` below `run`, whole or not at all, and point `latest` to it.

    Raises `CheckpointError` where the disk has no room or refuses; what was saved before is untouched then.
    """
    folder = run / f"step-{snapshot.step:06d}"
    free = shutil.disk_usage(run).free
    if snapshot.num_bytes > free:
        raise CheckpointError(
            f"{folder}: needs {snapshot.num_bytes / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB are free; make room and go on "
            f"with --resume auto --out {run}; what was saved before is untouched"
        )
    temporary = run / f".{folder.name}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, text in snapshot.texts.items():
            (temporary / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        for name, tensors in snapshot.tensors.items():
            save_file(dict(tensors), temporary / name)
        snapshot.tokenizer.save(temporary)
        digests = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps(digests, indent=1))
        for path in temporary.iterdir():
            _flush(path)
        _flush(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        _flush(run)
        point(run, LATEST, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CheckpointError(f"{folder}: cannot be written: {reason}; what was saved before is untouched") from error
    return folder


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

    Raises `CheckpointError` where it is missing or damaged, `ProfileError` where its providers cannot be had.
    """
    folder = find_checkpoint(Path(path))
    verify(folder)
    saved = read_saved(folder)
    config = read_resolved(folder / PROFILE, allow_local_code=allow_local_code).config
    resolved = resolve_config(config)
    check_lock(Lock.from_dict(saved["lock"]), make_lock(resolved), strict=strict_lock)
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


def load_weights(folder: Path, model: nn.Module) -> None:
    """Put the weights in place; names and shapes must agree. Raises `CheckpointError`."""
    weights = load_file(folder / WEIGHTS)
    own = model.state_dict()
    first = {tensor.data_ptr(): name for name, tensor in reversed(own.items())}
    for name, tensor in own.items():
        source = first[tensor.data_ptr()]
        if name not in weights and source in weights:
            weights[name] = weights[source]
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: its weights do not fit the profile's model: {error}") from error


def read_saved(folder: Path) -> dict[str, Any]:
    """The plain part of a checkpoint."""
    saved: dict[str, Any] = json.loads((folder / STATE).read_text())
    return saved


def restore(folder: Path, model: nn.Module, optimizer: Optimizer) -> tuple[RunState, dict[str, dict[str, object]]]:
    """Put weights and optimizer in place, for going on; returns where the run stood and what its plugins had saved."""
    saved = read_saved(folder)
    load_weights(folder, model)
    tensors = load_file(folder / OPTIMIZER)
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            # An imported model comes without an optimizer: its state stays that of the start.
            if isinstance(value, Tensor) and (tensors or saved["corpus"] != IMPORTED):
                value.copy_(tensors[f"{name}/{key}"].reshape(value.shape))
    return read_state(saved), _joined(saved["hooks"], load_file(folder / EXTRA))


@dataclass(frozen=True)
class RandomState:
    """The random states of one process: those of Python and NumPy as JSON values, those of PyTorch."""

    plain: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def now(cls) -> RandomState:
        """As they are."""
        tensors = {"torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors["cuda"] = torch.cuda.get_rng_state()
        return cls({"python": _listed(random.getstate()), "numpy": _numpy_state()}, tensors)


def restore_random(folder: Path, rank: int = 0) -> bool:
    """Put all random states in place: the last thing before the first step, so that nothing draws in between.

    Says whether the checkpoint holds any for this rank; one of fewer ranks does not.
    """
    kept, extra = read_saved(folder)["random"], load_file(folder / EXTRA)
    if rank >= len(kept):
        return False
    random.setstate(_tupled(kept[rank]["python"]))
    name, keys, position, has_gauss, cached = kept[rank]["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(extra[f"random.torch.{rank}"])
    if torch.cuda.is_available() and f"random.cuda.{rank}" in extra:
        torch.cuda.set_rng_state(extra[f"random.cuda.{rank}"])
    return True


def _distinct(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor once: tied weights are saved under their first name."""
    seen: dict[int, str] = {}
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.numel() and seen.setdefault(tensor.data_ptr(), name) != name:
            continue
        result[name] = tensor.contiguous()
    return result


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value.contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor)
    }


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


def _numpy_state() -> list[object]:
    name, keys, position, has_gauss, cached = np.random.get_state()
    return [name, [int(key) for key in keys], position, has_gauss, cached]


def _listed(value: object) -> object:
    return [_listed(each) for each in value] if isinstance(value, tuple) else value


def _tupled(value: object) -> tuple[object, ...]:
    assert isinstance(value, list)
    return tuple(tuple(each) if isinstance(each, list) else each for each in value)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
