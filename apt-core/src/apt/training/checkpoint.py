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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from apt.core.config import APTConfig
from apt.core.local import code_of, kept_name
from apt.core.lock import Lock, check_lock, make_lock
from apt.core.profile import dump_profile, read_resolved
from apt.core.providers import Tokenizer, TokenizerProvider
from apt.core.resolution import record_of
from apt.core.resolve import Resolved, resolve_config
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
MANIFEST, LATEST = "manifest.json", "latest"
FORMAT = 1


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


def save_checkpoint(
    run: Path,
    *,
    config: APTConfig,
    resolved: Resolved,
    model: nn.Module,
    optimizer: Optimizer,
    tokenizer: Tokenizer,
    state: RunState,
    hooks: Mapping[str, Mapping[str, object]],
    corpus_digest: str,
    keep_last: int,
) -> Path:
    """Write ``step-NNNNNN`` below `run`, point `latest` to it, and remove all but the last `keep_last`."""
    folder = run / f"step-{state.step:06d}"
    temporary = run / f".{folder.name}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        (temporary / PROFILE).write_text(dump_profile(config))
        save_file(_distinct(model.state_dict()), temporary / WEIGHTS)
        save_file(_optimizer_tensors(model, optimizer), temporary / OPTIMIZER)
        plain, tensors = _split(hooks)
        tensors["random.torch"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        save_file(tensors, temporary / EXTRA)
        saved = {
            "format": FORMAT,
            "step": state.step,
            "epoch": state.epoch,
            "max_steps": state.max_steps,
            "max_epochs": state.max_epochs,
            "plugins_on": list(state.plugins_on),
            "values": dict(state.values),
            "hooks": plain,
            "random": {"python": _listed(random.getstate()), "numpy": _numpy_state()},
            "corpus": corpus_digest,
            "lock": make_lock(resolved).to_dict(),
        }
        (temporary / STATE).write_text(json.dumps(saved, indent=1))
        tokenizer.save(temporary)
        for resolution in resolved.resolutions:
            record = record_of(resolution.provider)
            if record.sha256:
                (temporary / kept_name(record.name)).write_bytes(code_of(record))
        digests = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps(digests, indent=1))
        for path in temporary.iterdir():
            _flush(path)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{folder}: cannot be written: {error.strerror or error}; what was saved before is untouched"
        ) from error
    _flush(run)
    pointer = run / f".{LATEST}.part"
    pointer.write_text(folder.name + "\n")
    _flush(pointer)
    pointer.replace(run / LATEST)
    _flush(run)
    for old in sorted(run.glob("step-*"))[:-keep_last]:
        if old != folder:
            shutil.rmtree(old)
    return folder


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a run's folder or a checkpoint's folder means. Raises `CheckpointError`."""
    if (path / MANIFEST).is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such folder")
    pointer = path / LATEST
    if not pointer.is_file():
        raise CheckpointError(f"{path}: holds no checkpoint (no file named {LATEST})")
    folder = path / pointer.read_text().strip()
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{pointer}: points to {folder.name}, which is not there")
    return folder


def verify(folder: Path) -> None:
    """Compare every file with its digest. Raises `CheckpointError` naming what is damaged, and the checkpoint before."""
    try:
        digests = json.loads((folder / MANIFEST).read_text())
        wrong = [name for name, digest in digests.items() if _digest(folder / name) != digest]
    except (OSError, ValueError) as error:
        wrong = [str(error)]
    if wrong:
        before = [each.name for each in sorted(folder.parent.glob("step-*")) if each.name < folder.name]
        hint = f"use the one before, {folder.parent / before[-1]}" if before else "there is none before it"
        raise CheckpointError(f"{folder}: damaged ({', '.join(wrong)}); {hint}")


def load_run(path: Path | str, *, allow_local_code: bool = False, strict_lock: bool = False) -> LoadedRun:
    """The model of a run or checkpoint, on the CPU, in evaluation mode, with what was switched on.

    Raises `CheckpointError` where it is missing or damaged, `ProfileError` where its providers cannot be had.
    """
    folder = find_checkpoint(Path(path))
    verify(folder)
    saved = json.loads((folder / STATE).read_text())
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


def restore(
    folder: Path, model: nn.Module, optimizer: Optimizer
) -> tuple[RunState, dict[str, dict[str, object]], dict[str, object]]:
    """Weights, optimizer and random states, for going on; returns where the run stood, the hooks' state, and the rest."""
    saved = json.loads((folder / STATE).read_text())
    load_weights(folder, model)
    tensors = load_file(folder / OPTIMIZER)
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                value.copy_(tensors[f"{name}/{key}"].reshape(value.shape))
    extra = load_file(folder / EXTRA)
    hooks = _joined(saved["hooks"], extra)
    state = read_state(saved)
    kept = saved["random"]
    random.setstate(_tupled(kept["python"]))
    name, keys, position, has_gauss, cached = kept["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(extra["random.torch"])
    if torch.cuda.is_available() and "random.cuda" in extra:
        torch.cuda.set_rng_state(extra["random.cuda"])
    return state, hooks, saved


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
