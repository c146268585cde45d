"""Text from a model, a token at a time, with the keys and values of what was read kept.

A text may outgrow the model's context: then its last half is read again and goes on from there, so the memory is bounded and
positions stay those that the model was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from apt.core.hooks import HookRunner
from apt.core.providers import Tokenizer
from apt.hookspecs import NextToken, Prompt, RunState
from apt.inference.sampling import Sampling
from apt.modeling.model import Decoder

NOWHERE = RunState(0, 0, 0, 0)


@dataclass(frozen=True)
class Generation:
    """What was written after the prompt, its tokens, what plugins put before the prompt, and what did not fit."""

    text: str
    tokens: tuple[int, ...]
    sources: tuple[str, ...] = ()
    left_out: int = 0
    """Tokens at the prompt's start that the context had no room for."""


@torch.inference_mode()
def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    bos: int = 1,
    eos: int = 2,
    hooks: HookRunner | None = None,
    state: RunState = NOWHERE,
    show: Callable[[str], None] | None = None,
) -> Generation:
    """Go on from `prompt` until a document ends or `max_new_tokens` were drawn.

    The same seed gives the same text and touches no other random state. `show` is called with each new piece of text.
    Raises `UserError` for sampling values out of range.
    """
    sampling = Sampling(temperature, top_k, top_p)
    hooks = HookRunner() if hooks is None else hooks
    event = Prompt(prompt)
    hooks.hook.apt_prompt_prepare(prompt=event)
    device = model.embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    read = [bos, *tokenizer.encode(event.text)]
    room = model.max_seq_len
    left_out = max(0, len(read) - room)
    reader = _Reader(model, read[left_out:])
    changes = hooks.uses("apt_logits_ready")
    written: list[int] = []
    shown = 0
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            logits = reader.logits()
            if changes:
                moment = NextToken(torch.tensor([[*read, *written]], device=device), logits)
                hooks.hook.apt_logits_ready(state=state, next_token=moment)
                logits = moment.logits
            token = int(sampling.draw(logits, generator))
            if token in (eos, bos):
                break
            written.append(token)
            reader.add(token)
            if show is not None:
                text = tokenizer.decode(written)
                # A character may need more than one token: what is not whole yet waits.
                if not text.endswith("�"):
                    show(text[shown:])
                    shown = len(text)
    finally:
        model.train(was_training)
    text = tokenizer.decode(written)
    if show is not None and shown < len(text):
        show(text[shown:])
    hooks.hook.apt_generation_end(prompt=event, text=text)
    return Generation(text, tuple(written), tuple(event.sources), left_out)


class _Reader:
    """The model's context: reads tokens once, and reads the last half again where it is full."""

    def __init__(self, model: Decoder, tokens: Sequence[int]) -> None:
        self.model, self.context = model, list(tokens)
        self.device = model.embedding.weight.device
        self.waiting = list(tokens)
        self.cache = model.create_cache(1) if model.supports_kv_cache else None

    def add(self, token: int) -> None:
        """One more token to be read."""
        self.context.append(token)
        self.waiting.append(token)
        if len(self.context) > self.model.max_seq_len:
            self.context = self.context[-max(1, self.model.max_seq_len // 2) :]
            self.waiting = list(self.context)
            self.cache = None if self.cache is None else self.model.create_cache(1)

    def logits(self) -> torch.Tensor:
        """Read what waits; the scores of the next token [1, vocab]."""
        # Without a cache the whole context is read again for each token.
        tokens = torch.tensor([self.context if self.cache is None else self.waiting], device=self.device)
        self.waiting = []
        return self.model(tokens, cache=self.cache).logits[:, -1]
