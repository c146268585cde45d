from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apt_rag.fusion import WIDTH, Fusion, fold


def test_a_fresh_weighted_sum_changes_nothing_and_can_learn() -> None:
    torch.manual_seed(0)
    fusion = Fusion(1024, 8, 0.1)
    hidden, vectors, scores = torch.randn(2, 5, 8), torch.randn(2, 3, 1024), torch.rand(2, 3)
    fused = fusion.weighted_sum(hidden, vectors, scores)
    assert torch.equal(fused, hidden)
    fused.square().sum().backward()
    assert fusion.gate.grad is not None
    assert fusion.gate.grad.abs() > 0
    fusion.gate.data.fill_(0.5)
    fusion.weighted_sum(hidden, vectors, scores).square().sum().backward()
    assert fusion.project.weight.grad is not None
    assert fusion.project.weight.grad.abs().sum() > 0


def test_the_better_passage_weighs_more() -> None:
    torch.manual_seed(0)
    fusion = Fusion(512, 8, 0.1)
    fusion.gate.data.fill_(1.0)
    hidden, vectors = torch.zeros(1, 1, 8), torch.randn(1, 2, 512)
    alone = fusion.weighted_sum(hidden, vectors[:, :1], torch.ones(1, 1))
    nearly = fusion.weighted_sum(hidden, vectors, torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(nearly, alone, atol=1e-3, rtol=1e-3)


def test_concat_puts_passages_before_the_sequence() -> None:
    fusion = Fusion(1024, 8, 0.1)
    hidden = torch.randn(2, 5, 8)
    fused = fusion.concat(hidden, torch.randn(2, 3, 1024))
    assert fused.shape == (2, 8, 8)
    assert torch.equal(fused[:, 3:], hidden)


@given(st.integers(0, 2**31))
def test_folding_adds_cells_that_agree_modulo_the_width(seed: int) -> None:
    vectors = torch.randn(3, 2048, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cells = torch.arange(2048) % WIDTH
    expected = torch.zeros(3, WIDTH, dtype=torch.float64).index_add_(1, cells, vectors)
    torch.testing.assert_close(fold(vectors), expected)
    assert fold(vectors[:, :256]) is not None
    assert fold(vectors[:, :256]).shape[-1] == 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hidden_states_keep_their_type(dtype: torch.dtype) -> None:
    fusion = Fusion(1024, 8, 0.1)
    hidden = torch.randn(1, 2, 8, dtype=dtype)
    assert fusion.concat(hidden, torch.randn(1, 1, 1024)).dtype == dtype
