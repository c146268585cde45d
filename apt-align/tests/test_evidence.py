from collections.abc import Sequence

import pytest
import torch

from apt_align.evidence import Evidence


def log_p(logits: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1)


def test_without_memory_it_is_the_model_s_own_prediction() -> None:
    hidden, logits = torch.randn(2, 3, 8), torch.randn(2, 3, 20)
    torch.testing.assert_close(Evidence(8, 16, 4, 0.25, 0.15)(hidden, logits), log_p(logits))


def test_what_followed_the_same_state_before_is_expected_again() -> None:
    evidence = Evidence(8, 16, 1, 0.25, 0.15)
    hidden, logits = torch.randn(1, 5, 8), torch.zeros(1, 5, 20)
    targets = torch.tensor([[4, 7, 1, 0, 19]])
    evidence.remember(hidden, targets)
    p = evidence(3 * hidden, logits).exp()
    torch.testing.assert_close(p.sum(-1), torch.ones(1, 5))
    torch.testing.assert_close(p.gather(-1, targets.unsqueeze(-1)), torch.full((1, 5, 1), 0.25 + 0.75 / 20))


def test_it_is_the_mixture_that_its_formula_says() -> None:
    torch.manual_seed(0)
    evidence = Evidence(6, 12, 3, 0.4, 0.2)
    keys, values = torch.randn(1, 9, 6), torch.randint(0, 5, (1, 9))
    evidence.remember(keys, values)
    query, logits = torch.randn(1, 1, 6), torch.randn(1, 1, 5)
    cosines = torch.cosine_similarity(query[0], keys[0], dim=-1)
    best, found = cosines.topk(3)
    expected = 0.6 * logits[0, 0].softmax(-1)
    for share, place in zip((best / 0.2).softmax(-1), found, strict=True):
        expected[values[0, place]] += 0.4 * share
    torch.testing.assert_close(evidence(query, logits)[0, 0].exp(), expected)


def test_the_memory_keeps_the_latest_tokens_and_no_padding() -> None:
    evidence = Evidence(2, 4, 1, 0.25, 0.15)
    for number in range(3):
        evidence.remember(
            torch.randn(1, 3, 2),
            torch.tensor([[10 * number, 10 * number + 1, 99]]),
            torch.tensor([[True, True, False]]),
        )
    assert sorted(evidence.values.tolist()) == [10, 11, 20, 21]
    evidence.remember(torch.randn(1, 9, 2), torch.arange(9).unsqueeze(0))
    assert sorted(evidence.values.tolist()) == [5, 6, 7, 8]


def test_a_prediction_that_rules_tokens_out_stays_finite() -> None:
    logits = torch.tensor([[[0.0, -1e4, -1e4]]])
    assert Evidence(2, 4, 1, 0.25, 0.15)(torch.randn(1, 1, 2), logits).isfinite().all()


def test_under_autocast_it_is_what_it_is_without() -> None:
    evidence = Evidence(8, 16, 4, 0.25, 0.15)
    hidden, logits = torch.randn(2, 3, 8), torch.randn(2, 3, 20)
    evidence.remember(hidden, torch.randint(0, 20, (2, 3)))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = evidence(hidden, logits)
    torch.testing.assert_close(rounded, evidence(hidden, logits))


def test_states_that_are_not_finite_are_not_remembered() -> None:
    evidence = Evidence(8, 16, 4, 0.25, 0.15)
    hidden, logits = torch.randn(1, 4, 8), torch.randn(1, 4, 20)
    hidden[0, 1] = float("nan")
    evidence.remember(hidden, torch.tensor([[4, 7, 1, 0]]))
    assert evidence.values[:3].tolist() == [4, 1, 0]
    assert evidence.written == 3
    assert evidence(torch.randn(1, 4, 8), logits).isfinite().all()


def test_every_rank_remembers_the_tokens_of_all_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, targets = torch.randn(2, 2, 3, 8), torch.randint(0, 20, (2, 2, 3))  # of two ranks

    def gather(parts: Sequence[torch.Tensor], rows: torch.Tensor) -> None:
        """What the second rank gives to each."""
        keys = torch.nn.functional.normalize(hidden, dim=-1).flatten(1, 2)
        theirs = {2: keys, 1: torch.ones_like(keys[..., 0], dtype=torch.bool)}[rows.dim()]
        theirs = targets.flatten(1) if rows.dtype == torch.int64 else theirs
        assert torch.equal(rows, theirs[1])
        for part, each in zip(parts, theirs, strict=True):
            part.copy_(each)

    alone, shared = Evidence(8, 16, 4, 0.25, 0.15), Evidence(8, 16, 4, 0.25, 0.15)
    alone.remember(hidden.flatten(0, 1), targets.flatten(0, 1))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather", gather)
    shared.remember(hidden[1], targets[1])
    assert all(torch.equal(mine, yours) for mine, yours in zip(shared.buffers(), alone.buffers(), strict=True))
