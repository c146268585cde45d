"""Other weights of a model that a checkpoint holds, such as an average of those that were trained, by name.

A plugin that saves tensors as ``weights.<name>.<parameter>`` in `apt_checkpoint_save` offers a set of weights. What a set
does not hold stays as it was trained.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from apt.errors import CheckpointError
from apt.training.checkpoint import EXTRA, list_others
from apt.training.tensors import read_into, saved_shapes

TRAINED = "trained"
"""The name of the weights that the optimizer moved."""


def list_weights(folder: Path) -> list[str]:
    """The names of the sets that a checkpoint holds, `TRAINED` first."""
    return [TRAINED, *sorted({name for _, name, _ in list_others(saved_shapes(folder / EXTRA))} - {TRAINED})]


def use_weights(folder: Path, model: nn.Module, name: str) -> None:
    """Put a set of a checkpoint's weights into the model that was loaded from it.

    Raises `CheckpointError` where the checkpoint has no such set, or where it does not fit.
    """
    if name == TRAINED:
        return
    path = folder / EXTRA
    shapes = saved_shapes(path)
    chosen = {key: parameter for key, each, parameter in list_others(shapes) if each == name}
    if not chosen:
        has = ", ".join(list_weights(folder))
        hint = "; averaged weights are kept by model.align: mean_teacher (apt-align)" if name == "ema" else ""
        raise CheckpointError(f"{folder}: holds no weights {name!r}; it has: {has}{hint}")
    own = dict(model.named_parameters())
    for key, parameter in chosen.items():
        if parameter not in own or own[parameter].shape != shapes[key]:
            raise CheckpointError(f"{folder}: its weights {name!r} do not fit the profile's model: {parameter}")
    read_into(path, {key: own[parameter] for key, parameter in chosen.items()})
