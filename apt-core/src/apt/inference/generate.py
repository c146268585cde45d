"""Text from a model, a token at a time, for one prompt or a batch of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from apt.core.hooks import HookRunner
from apt.core.providers import Tokenizer
from apt.core.special import SpecialIds
from apt.errors import UserError
from apt.hookspecs import NextToken, Prompt, RunState
from apt.inference.context import Context
from apt.inference.prepare import folded
from apt.inference.sampling import Sampling
from apt.inference.stream import TextStream
from apt.inference.target import TargetContext
from apt.modeling.encoder_decoder import EncoderDecoder
from apt.modeling.model import Decoder

NOWHERE = RunState(0, 0, 0, 0)
USUAL = SpecialIds()


@dataclass(frozen=True)
class Generation:
    """What was written after the prompt, its tokens, what plugins put before the prompt, and what did not fit."""

    text: str
    tokens: tuple[int, ...]
    sources: tuple[str, ...] = ()
    left_out: int = 0
    """Tokens at the prompt's start, or at a source's end, that the context had no room for."""


@dataclass
class Row:
    """One text of a batch while it is written."""

    read: list[int]
    """The prompt's ids, those included that did not fit."""
    generator: torch.Generator
    written: list[int] = field(default_factory=list)


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
    special: SpecialIds = USUAL,
    hooks: HookRunner | None = None,
    state: RunState = NOWHERE,
    show: Callable[[str], None] | None = None,
) -> Generation:
    """Go on from `prompt` until a document ends or `max_new_tokens` were drawn; of an encoder-decoder it is the source.

    The same seed gives the same text and touches no other random state. `show` is called with each new piece of text.
    Raises `UserError` for sampling values out of range, and for a prompt that is no UTF-8.
    """
    sampling = Sampling(temperature, top_k, top_p)
    return _generate(model, tokenizer, [prompt], max_new_tokens, sampling, seed, special, hooks, state, show)[0]


def generate_batch(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    special: SpecialIds = USUAL,
    hooks: HookRunner | None = None,
    state: RunState = NOWHERE,
) -> list[Generation]:
    """What `generate` writes after each of the prompts, all read and written together.

    Every row draws from the seed by itself, so it does not matter which others are in the batch.
    """
    sampling = Sampling(temperature, top_k, top_p)
    return _generate(model, tokenizer, prompts, max_new_tokens, sampling, seed, special, hooks, state, None)


def _generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    special: SpecialIds,
    hooks: HookRunner | None,
    state: RunState,
    show: Callable[[str], None] | None,
) -> list[Generation]:
    check_numbers(max_new_tokens, seed)
    if not prompts:
        return []
    hooks = HookRunner() if hooks is None else hooks
    events = [Prompt(prompt) for prompt in prompts]
    for event in events:
        hooks.hook.apt_prompt_prepare(prompt=event)
    device = model.embedding.weight.device
    start = [] if special.start is None or isinstance(model, EncoderDecoder) else [special.start]
    rows = [
        Row([*start, *tokenizer.encode(check_text(event.text))], torch.Generator(device).manual_seed(seed))
        for event in events
    ]
    stream = TextStream(tokenizer)
    with inference(model):
        texts = [row.read for row in rows]
        context: Context | TargetContext
        if isinstance(model, EncoderDecoder):
            context, max_new_tokens = TargetContext(model, texts), min(max_new_tokens, model.max_seq_len)
        else:
            context = Context(model, texts, max(map(len, texts)) + max_new_tokens, special.pad)
        for tokens in draw(context, rows, sampling, special.stop, max_new_tokens, hooks, state):
            if show is not None and tokens[0] is not None and (piece := stream.add(tokens[0])):
                show(piece)
    if show is not None and (piece := stream.end()):
        show(piece)
    results = []
    for event, row in zip(events, rows, strict=True):
        text = tokenizer.decode(row.written)
        hooks.hook.apt_generation_end(prompt=event, text=text)
        left_out = max(0, len(row.read) - model.max_seq_len)
        results.append(Generation(text, tuple(row.written), tuple(event.sources), left_out))
    return results


def check_numbers(max_new_tokens: int, seed: int) -> None:
    """Raise `UserError` for numbers out of range."""
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens: {max_new_tokens} is not allowed; 0 or more")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed: {seed} is not allowed; from 0 to 2**63 - 1")


def check_text(text: str) -> str:
    """The text as it is. Raises `UserError` where it holds half of a character, which bytes that are no UTF-8 leave."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise UserError(f"the prompt holds {half!a}, half of a character; write it in UTF-8") from error
    return text


def draw(
    context: Context | TargetContext,
    rows: Sequence[Row],
    sampling: Sampling,
    stop: frozenset[int],
    max_new_tokens: int,
    hooks: HookRunner,
    state: RunState,
) -> Iterator[list[int | None]]:
    """Write the rows' next tokens until all of them have ended; each time, the token of every row (None: it has ended)."""
    changes = hooks.uses("apt_logits_ready")
    open_rows = set(range(len(rows)))
    for number in range(max_new_tokens):
        logits = context.logits()
        if changes:
            logits = _changed(logits, rows, open_rows, hooks, state)
        with torch.inference_mode():
            drawn = sampling.draw_rows(logits, [row.generator for row in rows])
        tokens: list[int | None] = []
        for index, (row, token) in enumerate(zip(rows, drawn, strict=True)):
            if index in open_rows and token in stop:
                open_rows.discard(index)
                context.close(index)
            if index in open_rows:
                row.written.append(token)
            tokens.append(token if index in open_rows else None)
        yield tokens
        if not open_rows or number + 1 == max_new_tokens:
            return
        context.add([context.pad if token is None else token for token in tokens])


@contextmanager
def inference(model: Decoder) -> Iterator[None]:
    """The model in evaluation mode, its attention folded where it can be; afterwards as it was."""
    was_training = model.training
    model.eval()
    try:
        with folded(model):
            yield
    finally:
        model.train(was_training)


@torch.inference_mode()
def _changed(
    logits: Float[Tensor, "batch vocab"], rows: Sequence[Row], open_rows: set[int], hooks: HookRunner, state: RunState
) -> Float[Tensor, "batch vocab"]:
    """The logits as plugins leave them; each row by itself, since rows differ in length."""
    changed = []
    for index, row in enumerate(rows):
        here = logits[index : index + 1]
        if index in open_rows:
            moment = NextToken(torch.tensor([[*row.read, *row.written]], device=logits.device), here)
            hooks.hook.apt_logits_ready(state=state, next_token=moment)
            here = moment.logits
        changed.append(here)
    return torch.cat(changed)
