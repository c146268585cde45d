"""What `check` foretells, held against what is built and measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from apt.core.estimate import estimate
from apt.core.profile import load_profile
from apt.modeling.compose import ModelBuilder
from apt.testing.measure import count_flops, saved_bytes
from apt.training.optim import make_optimizer


@pytest.mark.parametrize(
    "sets",
    [
        [],
        ["model.ffn=swiglu", "model.norm=rmsnorm", "model.tie_embeddings=false"],
        ["model.attention.num_kv_heads=1", "model.dropout=0.1", "model.max_seq_len=64", "training.batch_size=3"],
    ],
)
def test_parameters_are_exact_and_operations_and_memory_within_a_tenth(profile_file: Path, sets: list[str]) -> None:
    profile = load_profile(profile_file, sets=sets)
    assert profile.resolved is not None
    config, cost = profile.config, estimate(profile.config, profile.resolved)
    model = ModelBuilder(config, resolved=profile.resolved).build_model()
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert cost.active_parameters <= cost.parameters
    tokens = torch.randint(config.vocab_size, (config.training.batch_size, config.max_seq_len))
    counted = count_flops(lambda: model.eval()(tokens)) / tokens.numel()
    assert cost.flops_per_token == pytest.approx(counted, rel=0.1)

    def step() -> object:
        logits = model.train()(tokens).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    # Of the two copies of the logits that are counted, the second is made in the backward pass.
    kept = saved_bytes(model, step) + 4 * tokens.numel() * config.vocab_size
    assert cost.activations == pytest.approx(kept, rel=0.1)
    cache = model.create_cache(1, 10)
    numbers = sum(value.numel() for each in cache for value in vars(each).values() if torch.is_tensor(value))
    assert cost.cache_per_token == 4 * numbers // 10


@pytest.mark.parametrize("recompute", [False, True])
def test_what_attention_dropout_and_computing_anew_do_to_memory_is_foretold(
    profile_file: Path, recompute: bool
) -> None:
    sets = [f"training.recompute={str(recompute).lower()}", "model.attention_dropout=0.1", "model.max_seq_len=128"]
    profile = load_profile(profile_file, sets=sets)
    assert profile.resolved is not None
    config, cost = profile.config, estimate(profile.config, profile.resolved)
    model = ModelBuilder(config, resolved=profile.resolved).build_model().train()
    tokens = torch.randint(config.vocab_size, (config.training.batch_size, config.max_seq_len))
    if recompute:
        # The inputs of all blocks, and a block in its turn, which is more than the head takes.
        kept = saved_bytes(model, lambda: model.blocks[0](model.embedding(tokens), tokens=tokens))
        kept += 4 * tokens.numel() * config.d_model * len(model.blocks)
    else:
        kept = saved_bytes(
            model, lambda: nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), tokens.flatten())
        )
        kept += 4 * tokens.numel() * config.vocab_size
    assert cost.activations + cost.dropped_scores == pytest.approx(kept, rel=0.1)
    assert cost.training_flops[0] == (3 + recompute) * cost.flops_per_token


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_memory_of_the_optimizer_is_that_of_its_moments(profile_file: Path, optimizer: str) -> None:
    sets = [f"training.optimizer={optimizer}", "model.attention.bias=none"]
    profile = load_profile(profile_file, sets=sets)
    assert profile.resolved is not None
    model = ModelBuilder(profile.config, resolved=profile.resolved).build_model()
    state = make_optimizer(model, profile.config).state
    held = sum(value.nbytes for memory in state.values() for value in memory.values() if value.dim())
    assert estimate(profile.config, profile.resolved).optimizer == pytest.approx(held, rel=0.02)


def test_nothing_is_imported_to_foretell(profile_file: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from apt.cli import main; "
        f"code = main(['check', {str(profile_file)!r}]); sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "total" in done.stdout
