"""What a machine has, and whether a profile's training fits in it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from apt.core.config import APTConfig
    from apt.core.estimate import Estimate

MB = 2**20
RUNTIME_MB = 330
"""What an interpreter with PyTorch takes beside its tensors (measured by `benchmarks/memory.py`)."""


class HardwareProfile(BaseModel):
    """A machine. Sizes are in MB of 2^20 bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpu_count: int = Field(default=0, ge=0)
    gpu_type: str | None = None
    gpu_memory: int = Field(default=0, ge=0, description="of one GPU")
    cpu_count: int = Field(default=1, ge=1)
    ram_size: int = Field(default=0, ge=0)
    disk_space: int = Field(default=0, ge=0, description="free where runs are written")

    @classmethod
    def detect_hardware(cls, folder: Path | str = ".") -> HardwareProfile:
        """This machine, with the free space at `folder`. GPUs are known only where PyTorch is installed."""
        import psutil

        count, name, memory = _gpus()
        return cls(
            gpu_count=count,
            gpu_type=name,
            gpu_memory=memory,
            cpu_count=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            ram_size=psutil.virtual_memory().total // MB,
            disk_space=shutil.disk_usage(folder).free // MB,
        )

    def is_compatible_with(self, config: APTConfig) -> bool:
        """Whether one training step fits in a GPU's memory, or in RAM where there is no GPU, and checkpoints on the disk.

        Raises `ProfileError` where the profile's providers cannot be had.
        """
        cost = _cost(config)
        on_gpu = self.gpu_count > 0 and config.hardware.device != "cpu"
        if config.hardware.device == "cuda" and not on_gpu:
            return False
        room = self.gpu_memory if on_gpu else self.ram_size
        kept = (config.training.keep_last + 1) * (cost.weights + cost.optimizer + cost.averages)
        needed = _peak(cost) + (0 if on_gpu else cost.dropped_scores / MB)
        return needed <= room and kept / MB <= self.disk_space


def required_memory(config: APTConfig) -> float:
    """The peak of one training step in MB, the interpreter and PyTorch included."""
    return _peak(_cost(config))


def _cost(config: APTConfig) -> Estimate:
    from apt.core.estimate import estimate
    from apt.core.resolve import resolve_config

    return estimate(config, resolve_config(config))


def _peak(cost: Estimate) -> float:
    return cost.training_memory / MB + RUNTIME_MB


def _gpus() -> tuple[int, str | None, int]:
    try:
        import torch
    except ImportError:
        return 0, None, 0
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return 0, None, 0
    properties = torch.cuda.get_device_properties(0)
    return count, properties.name, properties.total_memory // MB
