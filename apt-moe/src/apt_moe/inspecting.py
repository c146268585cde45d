"""Which tokens go to which expert: read a text with a trained model and note what each router chooses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from apt.core.providers import Tokenizer
from apt.core.shown import harmless
from apt.errors import UserError
from apt_moe.layer import MixtureOfExperts

COLOURS = (
    "red",
    "green",
    "yellow",
    "blue",
    "magenta",
    "cyan",
    "bright_red",
    "bright_green",
    "bright_yellow",
    "bright_blue",
    "bright_magenta",
    "bright_cyan",
)
UNFINISHED, LONGEST = "\N{REPLACEMENT CHARACTER}", 4
"""What tokens decode to that are no whole character yet, and the bytes that a character has at most."""
SMOOTH = 5
"""How often a token must be met before its share says anything: added to the count that a share is taken of."""


@dataclass(frozen=True)
class Routing:
    """What one layer's router chose for a text: `indices` and `weights` [tokens, k]."""

    path: str
    num_experts: int
    indices: Tensor
    weights: Tensor

    @property
    def first(self) -> list[int | None]:
        """The expert with the largest weight, for each token; None where no expert chose it."""
        largest, place = self.weights.max(1, keepdim=True)
        experts = self.indices.gather(1, place).flatten().tolist()
        return [
            expert if chosen else None for expert, chosen in zip(experts, (largest > 0).flatten().tolist(), strict=True)
        ]

    @property
    def load(self) -> list[float]:
        """Each expert's share of all assignments that have a weight."""
        counts = torch.bincount(self.indices[self.weights > 0], minlength=self.num_experts).double()
        return (counts / counts.sum().clamp(min=1)).tolist()

    def typical(self, tokens: Sequence[int], expert: int, top: int) -> list[tuple[int, float, int]]:
        """The tokens most typical of an expert: (id, the share of its occurrences that go there, occurrences).

        Sorted by the share with `SMOOTH` occurrences elsewhere added, so that what is met once does not come first.
        """
        to_expert = ((self.indices == expert) & (self.weights > 0)).any(1).tolist()
        met = Counter(tokens)
        sent = Counter(token for token, there in zip(tokens, to_expert, strict=True) if there)
        order = sorted(sent, key=lambda token: (-sent[token] / (met[token] + SMOOTH), token))
        return [(token, sent[token] / met[token], met[token]) for token in order[:top]]


@runtime_checkable
class Encoding(Protocol):
    """A model that reads a text by an encoder: an encoder-decoder."""

    def encode(self, source: Tensor) -> object:
        """Read sources [batch, source]."""


@torch.no_grad()
def trace(model: nn.Module, tokens: Sequence[int], seq_len: int) -> list[Routing]:
    """Read `tokens` in windows of `seq_len` and give what each mixture's router chose, in the model's order.

    An encoder-decoder reads them as sources, so the mixtures are its encoder's. Raises `UserError` where no mixture that
    reads is switched on.
    """
    mixtures = {
        name: each for name, each in model.named_modules() if isinstance(each, MixtureOfExperts) and each.active
    }
    if not mixtures:
        raise UserError("this model has no experts that are switched on")
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in mixtures}
    handles = [
        mixture.register_forward_hook(
            lambda module, args, kwargs, _, name=name: seen[name].append(_choose(module, args[0], kwargs)),
            with_kwargs=True,
        )
        for name, mixture in mixtures.items()
    ]
    read = model.encode if isinstance(model, Encoding) else model
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    try:
        for start in range(0, len(tokens), seq_len):
            read(torch.tensor([list(tokens[start : start + seq_len])], device=device))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    if tokens and not any(seen.values()):
        raise UserError(
            "this encoder has no experts that are switched on; those of the decoder read targets, not a text"
        )
    return [
        Routing(
            name,
            mixture.experts.num_experts,
            torch.cat([indices for indices, _ in seen[name]]),
            torch.cat([weights for _, weights in seen[name]]),
        )
        for name, mixture in mixtures.items()
        if seen[name]
    ]


def _choose(mixture: MixtureOfExperts, x: Tensor, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    more = {"tokens": given["tokens"]} if mixture.takes_tokens else {}
    indices, weights, _ = mixture.router_provider.route(mixture.router, x, False, **more)
    return indices.flatten(0, 1).cpu(), weights.flatten(0, 1).float().cpu()


def inspect_run(
    folder: Path,
    text: Path,
    *,
    layer: int | None,
    top: int,
    chars: int,
    allow_local_code: bool,
    console: Console | None = None,
) -> None:
    """Print the text coloured by expert, and a table of each expert's load and most typical tokens."""
    from apt.runs import load_run

    for option, value in (("--top", top), ("--chars", chars)):
        if value < 0:
            raise UserError(f"{option} {value}: is not allowed; 0 or more")
    console = Console() if console is None else console
    run = load_run(folder, allow_local_code=allow_local_code)
    try:
        # With its line ends as they are, as training reads it.
        read = text.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{text}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    tokens = run.tokenizer.encode(read)
    if not tokens:
        raise UserError(f"{text}: is empty")
    with console.status("reading the text"):
        routings = trace(run.model, tokens, run.config.max_seq_len)
    by_block = {_block(routing.path): routing for routing in routings}
    chosen = max(by_block) if layer is None else layer
    if chosen not in by_block:
        raise UserError(f"--layer {chosen}: has no experts; blocks that have: {', '.join(map(str, by_block))}")
    routing = by_block[chosen]
    coloured = Text()
    length = 0
    experts = routing.first
    for piece, last in _pieces(run.tokenizer, tokens):
        expert = experts[last]
        length += len(piece)
        if length > chars:
            coloured.append(" ...")
            break
        coloured.append(harmless(piece), style="dim" if expert is None else _style(expert))
    where = f"encoder block {chosen}" if isinstance(run.model, Encoding) else f"block {chosen}"
    unserved = "; dim: no expert chose it" if None in routing.first else ""
    console.print(f"{where}: each token in the colour of the expert that weighs most{unserved}", highlight=False)
    console.print(coloured)
    table = Table("expert", "load", "most typical tokens (share of their occurrences that go there, occurrences)")
    for expert, share in enumerate(routing.load):
        listed = "  ".join(
            f"{run.tokenizer.decode([token])!r} {part:.0%} of {met}"
            for token, part, met in routing.typical(tokens, expert, top)
        )
        table.add_row(Text(str(expert), style=_style(expert)), f"{share:.1%}", Text(listed))
    console.print(table)


def _pieces(tokenizer: Tokenizer, tokens: Sequence[int]) -> Iterator[tuple[str, int]]:
    """The text in pieces of a token, and of several where they are a character together; with the number of each one's last."""
    start = 0
    for last in range(len(tokens)):
        piece = tokenizer.decode(list(tokens[start : last + 1]))
        if piece.endswith(UNFINISHED) and last - start + 1 < LONGEST and last + 1 < len(tokens):
            continue
        start = last + 1
        yield piece, last


def _style(expert: int) -> str:
    return COLOURS[expert % len(COLOURS)] + (" underline" if expert >= len(COLOURS) else "")


def _block(path: str) -> int:
    """The number of the block in a module's path, such as ``blocks.3.ffn``."""
    return next((int(word) for word in path.split(".") if word.isdecimal()), 0)
