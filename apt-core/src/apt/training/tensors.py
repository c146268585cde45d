"""Tensors on the disk: whole ones in one safetensors file, split ones beside it, a file a rank; and one way to read both.

What rank 0 holds whole goes to ``model.safetensors``. What is split over ranks (fsdp) goes to ``model.parts/``, where each rank
writes what it holds, by `torch.distributed.checkpoint` and its safetensors writer: nothing is gathered and nothing is pickled. A
reader says which tensors it wants filled, whole or split in whatever way; how they were written does not matter.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from apt.layers.sharded import fill, is_sharded, local
from apt.training.ranks import Ranks

SUFFIX, PARTS = ".safetensors", ".parts"


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, each once: tied weights under their first name."""
    seen: dict[int, str] = {}
    result: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        held = local(tensor)
        if held.numel() and seen.setdefault(held.data_ptr(), name) != name:
            continue
        result[name] = tensor
    return result


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What an optimizer remembers of each parameter, as ``<parameter>/<key>``: tensors, and single numbers."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor) and value.dim():
                tensors[f"{name}/{key}"] = value
            else:
                numbers[f"{name}/{key}"] = float(value)
    return tensors, numbers


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the machine's memory, that nothing changes later; split tensors stay split."""
    return {name: _copy(tensor) for name, tensor in tensors.items()}


def split_apart(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Those that are whole here, and those that are split over ranks."""
    whole = {name: tensor for name, tensor in tensors.items() if not is_sharded(tensor)}
    return whole, {name: tensor for name, tensor in tensors.items() if is_sharded(tensor)}


def write_whole(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def write_parts(path: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """A folder with a file a rank; all ranks call it. `path` is the file beside which it stands."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(path.with_suffix(PARTS)), save_distributed=True)
    save(dict(tensors), storage_writer=writer, process_group=ranks.group)


def saved_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The whole shape of every tensor that `path` and the folder beside it hold."""
    with safe_open(path, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes | {name: tuple(each.shape) for name, each in _split_forms(path).items()}


@torch.no_grad()
def read_all(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All that was saved: split and placed as the tensor of that name and shape in `like`, else whole and on the CPU.

    It is read into memory of its own: in the file tensors stand where they stand, and products of what is not aligned differ in
    the last bit.
    """
    targets = {}
    for name, form in (load_file(path) | _split_forms(path)).items():
        place = like.get(name)
        if place is not None and place.shape == form.shape:
            targets[name] = torch.empty_like(place, dtype=form.dtype)
        else:
            targets[name] = torch.empty_like(form, device="cpu")
    read_into(path, targets)
    return targets


def _split_forms(path: Path) -> dict[str, Tensor]:
    """Shape and type of every tensor that the folder beside `path` holds, as tensors without values."""
    folder = path.with_suffix(PARTS)
    if not folder.is_dir():
        return {}
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: torch.empty(each.size, dtype=each.properties.dtype, device="meta")  # type: ignore[union-attr]
        for name, each in found.items()
    }


@torch.no_grad()
def read_into(path: Path, targets: Mapping[str, Tensor]) -> None:
    """Fill tensors, by the names under which they were saved. Names and shapes must be those of `saved_shapes`."""
    with safe_open(path, framework="pt") as file:
        whole = set(file.keys())
        for name in targets.keys() & whole:
            fill(targets[name], file.get_tensor(name))
    split = {name: target.detach() for name, target in targets.items() if name not in whole}
    if split:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.state_dict_loader import load

        with _alone():
            load(split, storage_reader=HuggingFaceStorageReader(str(path.with_suffix(PARTS))), no_dist=True)


@contextmanager
def _alone() -> Iterator[None]:
    """Each process reads what it wants by itself, which torch finds worth a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to (load|save) in a single process.*")
        yield


def _copy(tensor: Tensor) -> Tensor:
    if not is_sharded(tensor):
        return tensor.detach().to("cpu", copy=True)
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    mesh = tensor.device_mesh
    if mesh.device_type != "cpu":
        # Nothing is computed with the copy, so its mesh needs no groups of processes; each would be made anew.
        mesh = DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names, _init_backend=False)
    return DTensor.from_local(
        tensor.to_local().detach().to("cpu", copy=True),
        mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
