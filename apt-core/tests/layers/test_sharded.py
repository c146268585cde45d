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
from apt.layers.sharded import is_sharded
from apt.modeling.compose import ModelBuilder
from apt.modeling.model import Decoder
from apt.training.evaluate import score
from apt.training.guard import find_source
from apt.training.measuring import find_shapes

TOKENS = torch.arange(8).view(2, 4)
BATCH = Batch(TOKENS, TOKENS)


@pytest.fixture
def split(tmp_path: Path) -> Iterator[Decoder]:
    """A small model under fsdp."""
    config = APTConfig(
        vocab_size=259, d_model=8, d_ff=16, num_heads=2, num_layers=1, max_seq_len=8, attention_name="sdpa"
    )
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = ModelBuilder(config).build_model()
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
