"""What an encoder-decoder has read: sources, once, and the targets that it writes of them so far."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from apt.modeling.encoder_decoder import EncoderDecoder


class TargetContext:
    """The batch's targets; each call of `logits` reads what was added since. A target has at most `max_seq_len` tokens."""

    @torch.inference_mode()
    def __init__(self, model: EncoderDecoder, sources: Sequence[Sequence[int]]) -> None:
        self.model, self.pad = model, model.pad
        device = model.embedding.weight.device
        # A source of nothing is the id that starts a text.
        read = [list(each[: model.max_seq_len]) or [model.bos] for each in sources]
        width = max(map(len, read))
        padded = torch.tensor([[*each, *[model.pad] * (width - len(each))] for each in read], device=device)
        self._memory = model.encode(padded)
        self._cache = model.create_cache(len(read)) if model.supports_kv_cache else None
        self._tokens = torch.full((len(read), 1), model.bos, device=device)

    def close(self, index: int) -> None:
        """Row `index` has ended; it is filled up with padding, which changes no other row."""

    def add(self, tokens: Sequence[int]) -> None:
        """One more token of each row, to be read."""
        self._tokens = torch.cat((self._tokens, self._tokens.new_tensor(tokens).unsqueeze(1)), 1)

    @torch.inference_mode()
    def logits(self) -> Float[Tensor, "batch vocab"]:
        """The scores of each row's next token."""
        # Without a cache the whole target is read again for each token.
        waiting = self._tokens if self._cache is None else self._tokens[:, -1:]
        scores: Tensor = self.model(waiting, self._memory, cache=self._cache, last=1).logits
        return scores[:, -1]
