"""Parameters that are split over ranks, here over one rank alone, which splits as many do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from apt.core.config import APTConfig
from apt.hookspecs import Batch
from apt.layers.sharded import fill, is_sharded, let_go, run_with, whole
from apt.modeling.compose import ModelBuilder
from apt.modeling.model import Decoder
from apt.training.evaluate import score
from apt.training.guard import find_source
from apt.training.measuring import find_shapes

CONFIG = APTConfig(
    vocab_size=259,
    d_model=8,
    d_ff=16,
    num_heads=2,
    num_layers=1,
    max_seq_len=8,
    attention_name="sdpa",
    dropout=0.0,
    attention_dropout=0.0,
)
TOKENS = torch.arange(8).view(2, 4)
BATCH = Batch(TOKENS, TOKENS)


@pytest.fixture
def split(tmp_path: Path) -> Iterator[Decoder]:
    """A small model under fsdp."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = ModelBuilder(CONFIG).build_model()
        for block in model.all_blocks():
            fully_shard(block)
        yield fully_shard(model)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "look",
    [
        lambda model: score(model, [BATCH], bytes_per_token=1.0),
        lambda model: find_source(model, torch.autocast("cpu", enabled=False), [BATCH], {}),
        lambda model: find_shapes(model, TOKENS, bf16=False),
    ],
    ids=["evaluation", "the search for what is not finite", "measuring"],
)
def test_what_looks_at_a_split_model_leaves_it_its_own_parameters(
    split: Decoder, look: Callable[[Decoder], object]
) -> None:
    own = list(split.parameters())
    look(split)
    assert all(is_sharded(each) for each in own)
    assert all(one is other for one, other in zip(split.parameters(), own, strict=True))


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_pass_with_other_weights_leaves_the_backward_pass_of_the_one_before_as_it_was(
    split: Decoder, bf16: bool
) -> None:
    plain = ModelBuilder(CONFIG).build_model()
    for name, parameter in split.named_parameters():
        fill(plain.get_parameter(name), whole(parameter))
    before = [whole(each).clone() for each in split.parameters()]
    others = {name: 2 * each.detach() + 0.1 for name, each in split.named_parameters()}
    wholes = {name: whole(each) for name, each in others.items()}
    heard = {}
    for model, weights in ((plain, wholes), (split, others)):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            said = model(TOKENS).logits
            heard[model] = run_with(model, weights, TOKENS).logits
            again = model.head(torch.ones(8))  # by a hook, which is not in the model's pass
        (said.logsumexp(-1).sum() + again.logsumexp(-1)).backward()
    assert not heard[split].requires_grad
    assert torch.equal(heard[split], heard[plain])
    for (_, own), expected, was in zip(split.named_parameters(), plain.parameters(), before, strict=True):
        assert torch.equal(whole(own), was)
        assert own.grad is not None
        torch.testing.assert_close(whole(own.grad), expected.grad, atol=1e-6, rtol=1e-2 if bf16 else 1e-5)
    let_go(split)
