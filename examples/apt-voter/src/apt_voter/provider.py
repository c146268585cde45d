"""The plugin `voter`: options and hooks. PyTorch is imported when a model writes, not before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from apt.core.providers import Plugin
from apt.hookspecs import NextToken, RunState, hookimpl


class Voter(Plugin):
    """Where the entropy of the next token exceeds a threshold, `k` draws of it vote; elsewhere nothing changes.

    The threshold may be scheduled (`vote_threshold`): generation uses the value that training ended with.
    """

    api_level: ClassVar[int] = 1
    scheduled: ClassVar[Mapping[str, str]] = {"vote_threshold": ""}

    threshold: float = Field(
        default=2.2, ge=0, description="entropy in nats from which on draws vote; the schedule vote_threshold moves it"
    )
    k: int = Field(default=3, ge=1, description="draws that vote; 1 is a plain draw, many are the likeliest token")
    seed: int = Field(default=0, description="of the draws; the same text always votes the same way")

    @hookimpl
    def apt_logits_ready(self, state: RunState, next_token: NextToken) -> None:
        """Replace the logits of each unsure row by those of the token that was elected."""
        import torch

        from apt_voter.functional import elect, entropy, seed_of, vote

        threshold = state.values.get("vote_threshold", self.threshold)
        unsure = (entropy(next_token.logits) > threshold).tolist()
        if not any(unsure):
            return
        rows = []
        for logits, tokens, is_unsure in zip(next_token.logits, next_token.tokens.tolist(), unsure, strict=True):
            if is_unsure:
                generator = torch.Generator(logits.device).manual_seed(seed_of(tokens, self.seed))
                rows.append(elect(logits, vote(logits, self.k, generator)))
            else:
                rows.append(logits)
        next_token.logits = torch.stack(rows)
