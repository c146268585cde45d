"""How many floating-point operations a second a device can do at most, where that is known, for the share that a run uses."""

from __future__ import annotations

import torch

from apt.core.config import APTConfig
from apt.core.estimate import estimate
from apt.core.resolve import Resolved
from apt.hookspecs import RunState

PEAKS: dict[str, tuple[float, float]] = {
    "B200": (2250e12, 75e12),
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "A10": (125e12, 31.2e12),
    "L4": (121e12, 30.3e12),
    "RTX 4090": (165.2e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
}
"""GPU -> dense operations a second in bf16 with float32 sums, and in float32, from the makers' data sheets."""


def peak_flops(device: torch.device, precision: str, stated: float | None) -> float | None:
    """What the profile states; else what the table says of this GPU; None where it says nothing, as of all CPUs."""
    if stated is not None or device.type != "cuda":
        return stated
    return peak_of(torch.cuda.get_device_name(device), precision)


def peak_of(name: str, precision: str) -> float | None:
    """The peak of a GPU by its name as PyTorch gives it, such as ``NVIDIA A100-SXM4-80GB``."""
    words = name.replace("-", " ").split()
    for known, (bf16, fp32) in PEAKS.items():
        wanted = known.split()
        if any(words[at : at + len(wanted)] == wanted for at in range(len(words))):
            return bf16 if precision == "bf16" else fp32
    return None


class Utilisation:
    """The share of the devices' peak that a run uses (MFU; Chowdhery et al. 2022, arXiv:2204.02311, appendix B).

    Counted are the operations of the whole model, everything switched on, three times those of a forward pass; what is computed
    anew is not counted.
    """

    def __init__(self, config: APTConfig, resolved: Resolved, device: torch.device, num_devices: int) -> None:
        peak = peak_flops(device, config.training.precision, config.hardware.peak_flops)
        self._peak = None if peak is None else peak * num_devices
        if self._peak is not None:
            self._cost = estimate(config, resolved)

    def of(self, tokens_per_second: float, state: RunState) -> float | None:
        """The share, between 0 and 1; None where the peak is not known."""
        if self._peak is None:
            return None
        passes = self._cost.step_cost if "align" in state.plugins_on else 1.0
        return round(3 * self._cost.flops_per_token * passes * tokens_per_second / self._peak, 4)
