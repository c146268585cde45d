"""A small text and a small profile, trained on apt-core alone."""

from __future__ import annotations

from pathlib import Path

import pytest

PROFILE = """\
name: small
model:
  d_model: 16
  num_heads: 2
  num_layers: 2
  d_ff: 32
  max_seq_len: 16
  dropout: 0.0
  attention_dropout: 0.0
  attention: {{provider: sdpa}}
  ffn: {{provider: default}}
training: {{max_epochs: 2, steps_per_epoch: 4, batch_size: 2, learning_rate: 3e-3, warmup_steps: 2}}
data: {{source: files, path: "{text}"}}
evaluation: {{max_batches: 2, sample_prompt: "def ", sample_tokens: 5}}
monitoring: {{log_every: 1, plot: false}}
"""


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough text for every split to hold some windows of 16 tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"def f{number}(x):\n    return x + {number}\n\n" for number in range(120)))
    return path


@pytest.fixture
def profile_file(tmp_path: Path, text_file: Path) -> Path:
    """A profile of four steps and two epochs on the small text."""
    path = tmp_path / "small.yaml"
    path.write_text(PROFILE.format(text=text_file))
    return path
