"""The held-out score: every token once, in nats and bits a byte, in evaluation mode, and nothing touched."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from apt.data.tokens import TokenSplit
from apt.layers import Output
from apt.training.evaluate import evaluate

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


def test_no_random_state_is_touched() -> None:
    before = torch.get_rng_state()
    evaluate(Guess(1.0), split(100, 100), seq_len=8, batch_size=2)
    assert torch.equal(before, torch.get_rng_state())
