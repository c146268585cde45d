"""What the tests on a GPU share. They are run by naming this folder: `pytest tests/gpu`; all other tests see no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

PROFILE = """\
name: gpu
model:
  {{d_model: 64, num_heads: 4, num_layers: 2, d_ff: 128, max_seq_len: 64, dropout: 0.1, attention_dropout: 0.0, attention: sdpa,
   ffn: default}}
training: {{max_steps: 6, steps_per_epoch: 6, batch_size: 4, warmup_steps: 1, learning_rate: 1e-3, save_every: 3, keep_last: 9}}
data: {{source: files, path: "{text}"}}
evaluation: {{max_batches: 2, sample_tokens: 0}}
monitoring: {{plot: false, log_every: 1}}
hardware: {{threads: 1, device: cuda, deterministic: true}}
"""


@pytest.fixture
def profile(text: Path, tmp_path: Path) -> Path:
    """Six steps of a small model on the GPU."""
    path = tmp_path / "profile.yaml"
    path.write_text(PROFILE.format(text=text))
    return path


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """float32 is float32: no TensorFloat32, whatever the defaults are."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
