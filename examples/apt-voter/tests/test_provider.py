from __future__ import annotations

import pytest
import torch
from apt_voter.provider import Voter

from apt.core.hooks import HookRunner
from apt.hookspecs import NextToken, RunState
from apt.testing import conformance

UNSURE, SURE = [0.0, 0.1, 0.2], [0.0, 0.0, 30.0]

test_conformance = conformance("plugin.voter")


def moment() -> NextToken:
    return NextToken(torch.tensor([[1, 5], [1, 6]]), torch.tensor([UNSURE, SURE]))


def state(**values: float) -> RunState:
    return RunState(3, 1, 3, 1, ("voter",), values)


def test_only_a_row_that_is_unsure_is_voted_on() -> None:
    now = moment()
    Voter(threshold=1.0).apt_logits_ready(state(), now)
    assert now.logits[0].isfinite().sum() == 1
    assert now.logits[1].tolist() == SURE


def test_below_the_threshold_nothing_is_touched() -> None:
    now = moment()
    before = now.logits
    Voter(threshold=2.0).apt_logits_ready(state(), now)
    assert now.logits is before


def test_the_scheduled_threshold_goes_before_the_option() -> None:
    now = moment()
    Voter(threshold=1.0).apt_logits_ready(state(vote_threshold=2.0), now)
    assert now.logits.tolist() == moment().logits.tolist()


def test_the_same_text_votes_the_same_way_alone_and_in_a_batch_and_draws_from_no_other_generator() -> None:
    together, alone = moment(), moment()
    alone = NextToken(alone.tokens[:1], alone.logits[:1])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for now in (together, alone):
        Voter(threshold=1.0).apt_logits_ready(state(), now)
    assert together.logits[0].tolist() == alone.logits[0].tolist()
    assert torch.equal(before, torch.get_rng_state())


def test_another_seed_may_elect_another_token() -> None:
    elected = set()
    for seed in range(30):
        now = moment()
        Voter(threshold=1.0, k=1, seed=seed).apt_logits_ready(state(), now)
        elected.add(int(now.logits[0].argmax()))
    assert elected == {0, 1, 2}


@pytest.mark.parametrize("options", [{"k": 0}, {"threshold": -1.0}, {"votes": 3}])
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    assert not Voter.validate_config(options)


def test_it_is_called_through_the_hooks() -> None:
    now = moment()
    HookRunner({"voter": Voter(threshold=1.0)}).hook.apt_logits_ready(state=state(), next_token=now)
    assert now.logits[0].isfinite().sum() == 1
