"""Other weights of a model that a checkpoint holds, such as an average of those that were trained, by name.

A plugin that saves tensors as ``weights.<name>.<parameter>`` in `apt_checkpoint_save` offers a set of weights. What a set
does not hold stays as it was trained.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from apt.errors import CheckpointError
from apt.training.checkpoint import EXTRA, OTHERS

TRAINED = "trained"
"""The name of the weights that the optimizer moved."""


def list_weights(folder: Path) -> list[str]:
    """The names of the sets that a checkpoint holds, `TRAINED` first."""
    return [TRAINED, *sorted({name for name, _, _ in _keys(folder)} - {TRAINED})]


@torch.no_grad()
def use_weights(folder: Path, model: nn.Module, name: str) -> None:
    """Put a set of a checkpoint's weights into the model that was loaded from it.

    Raises `CheckpointError` where the checkpoint has no such set, or where it does not fit.
    """
    if name == TRAINED:
        return
    chosen = [(parameter, key) for each, parameter, key in _keys(folder) if each == name]
    if not chosen:
        has = ", ".join(list_weights(folder))
        hint = "; averaged weights are kept by model.align: mean_teacher (apt-align)" if name == "ema" else ""
        raise CheckpointError(f"{folder}: holds no weights {name!r}; it has: {has}{hint}")
    own = dict(model.named_parameters())
    with safe_open(folder / EXTRA, framework="pt") as file:
        for parameter, key in chosen:
            tensor = file.get_tensor(key)
            if parameter not in own or own[parameter].shape != tensor.shape:
                raise CheckpointError(f"{folder}: its weights {name!r} do not fit the profile's model: {parameter}")
            own[parameter].copy_(tensor)


def _keys(folder: Path) -> list[tuple[str, str, str]]:
    """The set, the parameter and the file's key of each tensor."""
    found = []
    with safe_open(folder / EXTRA, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            _, _, saved = key.removeprefix("hooks.").partition("/")
            if key.startswith("hooks.") and saved.startswith(OTHERS):
                name, _, parameter = saved.removeprefix(OTHERS).partition(".")
                found.append((name, parameter, key))
    return found
