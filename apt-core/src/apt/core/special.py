"""The ids of a vocabulary that are no text: what starts a text and what ends one."""

from __future__ import annotations

from dataclasses import dataclass

from apt.core.config import APTConfig
from apt.core.providers import TokenizerProvider
from apt.core.resolve import Resolved


@dataclass(frozen=True)
class SpecialIds:
    """`start` goes before a prompt (None: nothing does), each of `stop` ends a text, `pad` fills rows up."""

    start: int | None = 1
    stop: frozenset[int] = frozenset((1, 2))
    pad: int = 0

    @classmethod
    def of(cls, config: APTConfig, resolved: Resolved) -> SpecialIds:
        """Those of a run. The start of another text ends one, too: corpora have no other mark between documents."""
        provider = resolved.providers["tokenizer"]
        assert isinstance(provider, TokenizerProvider)
        stop = frozenset((config.bos_token_id, config.eos_token_id, *provider.get_stop_ids()))
        return cls(config.bos_token_id if provider.starts_with_bos() else None, stop, config.pad_token_id)
