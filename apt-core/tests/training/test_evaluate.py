"""The held-out score: every token once, in nats and bits a byte, in evaluation mode, and nothing touched."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from apt.data.tokens import TokenSplit
from apt.layers import Output, Part
from apt.modeling.block import TransformerBlock
from apt.modeling.model import Decoder
from apt.training.evaluate import evaluate
from apt.training.ranks import Ranks

IDS = 32


class Guess(nn.Module):
    """Gives the right next token, which is the last plus one, a logit of `bonus`, and the others 0."""

    def __init__(self, bonus: float) -> None:
        super().__init__()
        self.bonus = bonus
        self.dropout = nn.Dropout(0.5)

    def forward(self, tokens: Tensor) -> Output:
        logits = self.bonus * nn.functional.one_hot((tokens + 1) % IDS, IDS)
        return Output(self.dropout(logits.float()), tokens[..., None].float(), {}, {"first": tokens[0, 0].float()})


def split(tokens: int, num_bytes: int) -> TokenSplit:
    return TokenSplit(np.arange(tokens, dtype=np.uint16) % IDS, num_bytes, 1)


@pytest.mark.parametrize("bonus", [0.0, 3.0])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_score_is_the_mean_over_all_tokens_and_its_bits_are_shared_by_the_bytes(
    bonus: float, batch_size: int
) -> None:
    model = Guess(bonus).train()
    # 101 targets: the last window is short.
    score, _ = evaluate(model, split(102, 51), seq_len=8, batch_size=batch_size)
    right = math.log(math.exp(bonus) + IDS - 1) - bonus
    assert score.num_tokens == 101
    assert score.loss == pytest.approx(right, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(right / math.log(2) * 2, rel=1e-5)
    assert model.training


def test_a_few_batches_are_enough_where_that_is_asked() -> None:
    score, metrics = evaluate(Guess(1.0), split(1001, 1001), seq_len=8, batch_size=2, max_batches=3)
    assert score.num_tokens == 48
    assert set(metrics) == {"first"}


class Attends(nn.Module):
    """An attention that is not told of padding, since windows are read whole."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None, **other: object) -> Tensor:
        assert mask is None
        return x


class Counts(nn.Module):
    """A feed-forward layer whose metric is how many tokens it is to count."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Part:
        return Part(x, {}, {"counted": torch.tensor(float(x[..., 0].numel() if mask is None else mask.sum()))})


class Second(Ranks):
    """The second of two ranks, as if the first one had nothing to add."""

    def sum(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(values)


def test_what_fills_up_a_window_or_the_rows_of_the_ranks_counts_in_no_metric() -> None:
    block = TransformerBlock(Attends(), Counts(), nn.Identity(), nn.Identity(), 0.0)
    model = Decoder(nn.Embedding(IDS, 4), [block], nn.Identity(), dropout=0.0, max_seq_len=8, tie_embeddings=True)
    # Four batches of three windows of eight tokens, and one of a window of five.
    score, metrics = evaluate(model, split(102, 51), seq_len=8, batch_size=3)
    assert score.num_tokens == 101
    assert metrics["counted"].item() == pytest.approx((4 * 24 * 24 + 5 * 5) / 101)
    for batch_size, counted in ((1, 0.0), (2, 8.0)):
        _, metrics = evaluate(model, split(98, 51), seq_len=8, batch_size=batch_size, ranks=Second(1, 2))
        assert metrics["counted"].item() == counted


def test_no_random_state_is_touched() -> None:
    before = torch.get_rng_state()
    evaluate(Guess(1.0), split(100, 100), seq_len=8, batch_size=2)
    assert torch.equal(before, torch.get_rng_state())
