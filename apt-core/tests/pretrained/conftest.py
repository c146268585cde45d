"""A tiny Llama with random weights, as a run and as transformers would write it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from apt.cli import main
from apt.training.checkpoint import LoadedRun, load_run

PROFILE = """\
name: tiny
model:
  {{d_model: 16, num_heads: 4, num_layers: 2, d_ff: 24, max_seq_len: 32, dropout: 0.0, attention_dropout: 0.0,
   norm: rmsnorm, tie_embeddings: {tied}, ffn: swiglu,
   attention: {{provider: sdpa, num_kv_heads: 2, rope_theta: 500.0{attention}}}}}
training: {{max_steps: 1, batch_size: 2, warmup_steps: 0}}
data: {{source: files, path: "{text}", tokenizer: {tokenizer}}}
evaluation: {{max_batches: 1, sample_tokens: 0}}
monitoring: {{plot: false}}
"""


def train(
    folder: Path,
    text: Path,
    *,
    tied: bool = False,
    tokenizer: str = "{provider: bpe, vocab_size: 512}",
    attention: str = "",
) -> Path:
    """A run of one step; `attention` are further options."""
    folder.mkdir(parents=True)
    profile = folder / "tiny.yaml"
    profile.write_text(PROFILE.format(tied=str(tied).lower(), text=text, tokenizer=tokenizer, attention=attention))
    assert main(["train", "-p", str(profile), "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Varied enough for 512 ids."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    words = [f"{a}{b}{c}" for a in "bdfgk" for b in ("an", "ert", "ol") for c in ("ing", "ed", "s")]
    path.write_text("".join(f"The {words[i % 45]} {words[i * 7 % 45]} {i}.\n" for i in range(1200)))
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """An untied run with a BPE."""
    return train(tmp_path_factory.mktemp("untied") / "x", corpus)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    """The same as transformers' folder."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    assert main(["export", "hf", str(trained), str(folder)]) == 0
    return folder


def logits(run: LoadedRun) -> torch.Tensor:
    """Of a fixed text."""
    tokens = torch.arange(3, 23)[None]
    with torch.inference_mode():
        scores: torch.Tensor = run.model(tokens).logits
    return scores


def change(folder: Path, **tensors: torch.Tensor) -> None:
    """Add tensors to a folder's weights."""
    path = folder / "model.safetensors"
    save_file({**load_file(path), **tensors}, path)


def loaded(path: Path) -> LoadedRun:
    """A run."""
    return load_run(path)
