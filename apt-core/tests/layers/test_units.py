"""Units for bfloat16 are those of the processor, not what oneDNN can do without them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from apt.layers.units import has_units


@pytest.mark.parametrize(
    ("onednn", "avx512", "bf16", "amx", "units"),
    [
        (False, False, False, False, False),  # AVX2
        (True, True, False, False, False),  # Skylake and Ice Lake
        (True, True, True, False, True),
        (True, True, True, True, True),
        (False, True, True, True, False),  # ONEDNN_MAX_CPU_ISA=AVX2
        (True, False, False, False, True),  # ARM with its own
    ],
)
def test_a_processor_with_avx_512_alone_has_no_units_for_bf16(
    monkeypatch: pytest.MonkeyPatch, onednn: bool, avx512: bool, bf16: bool, amx: bool, units: bool
) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(_is_mkldnn_bf16_supported=lambda: onednn))
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert has_units.__wrapped__() is units
