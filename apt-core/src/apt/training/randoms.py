"""The random states of a process, as JSON values and tensors; and kernels that leave nothing to chance."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_devices() -> list[int]:
    """The GPU whose random state belongs to this process, as `torch.random.fork_rng` takes it; none where none is in use.

    A run on the CPU of a machine that has GPUs leaves them alone: asking one takes half a gigabyte of it.
    """
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return [torch.cuda.current_device()] if in_use else []


@dataclass(frozen=True)
class RandomState:
    """Those of Python and NumPy as JSON values, those of PyTorch as tensors."""

    plain: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @classmethod
    def now(cls) -> RandomState:
        """As they are."""
        tensors = {"torch": torch.get_rng_state()}
        if random_devices():
            tensors["cuda"] = torch.cuda.get_rng_state()
        return cls({"python": _listed(random.getstate()), "numpy": _numpy_state()}, tensors)

    def restore(self) -> None:
        """Make them what they were."""
        random.setstate(_tupled(self.plain["python"]))
        name, keys, position, has_gauss, cached = self.plain["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
        torch.set_rng_state(self.tensors["torch"])
        if random_devices() and "cuda" in self.tensors:
            torch.cuda.set_rng_state(self.tensors["cuda"])


@contextlib.contextmanager
def same_randoms() -> Iterator[None]:
    """A context after which all random states are what they were before."""
    before = RandomState.now()
    try:
        yield
    finally:
        before.restore()


def name_tensors(states: Sequence[RandomState]) -> dict[str, Tensor]:
    """The tensors of all ranks, each with a name of its own."""
    return {
        f"random.{name}.{rank}": tensor for rank, state in enumerate(states) for name, tensor in state.tensors.items()
    }


def find_state(plain: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor], rank: int) -> RandomState | None:
    """The state of one rank from what was saved of all; None where there were fewer."""
    if rank >= len(plain):
        return None
    mine = {
        name.split(".")[1]: tensor
        for name, tensor in tensors.items()
        if name.startswith("random.") and name.endswith(f".{rank}")
    }
    return RandomState(plain[rank], mine)


def _numpy_state() -> list[object]:
    name, keys, position, has_gauss, cached = np.random.get_state()
    return [name, [int(key) for key in keys], position, has_gauss, cached]


def _listed(value: object) -> object:
    return [_listed(each) for each in value] if isinstance(value, tuple) else value


def _tupled(value: object) -> tuple[object, ...]:
    assert isinstance(value, list)
    return tuple(tuple(each) if isinstance(each, list) else each for each in value)


@contextlib.contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """Where it is wanted, let PyTorch take kernels alone that give the same bits every time, in the whole process.

    On the CPU they do so anyway. On a GPU sums of many threads come in any order, as in the backward pass of attention. Where
    there is no other kernel PyTorch warns.
    """
    if not wanted:
        yield
        return
    # What cuBLAS asks for; it is read when its first product is computed.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
