"""One contestant of `benchmarks/train.py`: trains a model in a process of its own, so many steps at a time.

``python train_worker.py CASE`` where CASE is a JSON object; it runs in the contestant's own interpreter and imports nothing of
apt unless the contestant is apt. Lines on standard output: {"ready": parameters} when it is warm; for each number read from
standard input, so many steps and {"seconds": s}; at the end of input {"peak_mb": m}. On a GPU a step
that is not counted comes before.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

Step = Callable[[], None]
OUT = os.fdopen(os.dup(1), "w", buffering=1)
"""The parent's end; whatever libraries print goes elsewhere."""


def main() -> None:
    """Read the case, and serve."""
    os.dup2(2, 1)
    case = json.loads(sys.argv[1])
    import torch

    torch.set_num_threads(case["threads"])
    torch.manual_seed(0)
    if case["kind"] == "apt":
        train_apt(case)
    else:
        make = {"nanogpt": make_nanogpt, "llama": make_llama, "litgpt": make_litgpt}[case["kind"]]
        with seat(case):
            step, parameters = make(case)
            for _ in range(case["warm"]):
                step()
            forget(case)
        say(ready=parameters)
        for count in wanted():
            if on_gpu(case):
                step()  # takes the memory again
            start = clock(case)
            for _ in range(count):
                step()
            seconds = clock(case) - start
            rest(case)
            say(seconds=seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    say(peak_mb=torch.cuda.max_memory_allocated() / 2**20 if on_gpu(case) else peak)


def on_gpu(case: dict) -> bool:
    """Whether it trains on a GPU."""
    return case["device"] == "cuda"


def clock(case: dict) -> float:
    """Seconds; on a GPU when all that was asked of it is done."""
    if on_gpu(case):
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def rest(case: dict) -> None:
    """Leave the memory of a GPU to the others, but for what is held."""
    if on_gpu(case):
        import torch

        torch.cuda.empty_cache()


def forget(case: dict) -> None:
    """The start is over: what it took does not count."""
    if on_gpu(case):
        import torch

        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextlib.contextmanager
def seat(case: dict) -> Iterator[None]:
    """One of the places on the GPU while it warms up; elsewhere nobody waits."""
    if not case["seats"]:
        yield
        return
    files = [open(name, "w") for name in case["seats"]]  # noqa: SIM115
    taken = None
    while taken is None:
        for file in files:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                taken = file
                break
        else:
            time.sleep(0.1)
    try:
        yield
    finally:
        fcntl.flock(taken, fcntl.LOCK_UN)


def autocast(case: dict) -> contextlib.AbstractContextManager:
    """bfloat16 products where it is asked for."""
    import torch

    return torch.autocast(case["device"], torch.bfloat16, enabled=case["precision"] == "bf16")


def say(**values: object) -> None:
    """One line to the parent."""
    OUT.write(json.dumps(values) + "\n")


def wanted() -> Iterator[int]:
    """How many steps are asked for, again and again."""
    for line in sys.stdin:
        yield int(line)


def batches(case: dict, together: bool) -> Callable[[], tuple]:
    """Windows at random places of a memory map: sliced one by one as nanoGPT does, or gathered at once.

    To a GPU they go from pinned memory, and nothing waits for them.
    """
    import numpy as np
    import torch

    block, size = case["block"], case["batch"]

    def sliced() -> tuple:
        data = np.memmap(case["data"], dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - block, (size,))
        x = torch.stack([torch.from_numpy(data[i : i + block].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + block].astype(np.int64)) for i in starts])
        return send(x), send(y)

    def send(x: torch.Tensor) -> torch.Tensor:
        return x.pin_memory().to("cuda", non_blocking=True) if on_gpu(case) else x

    data = np.memmap(case["data"], dtype=np.uint16, mode="r")

    def gathered() -> tuple:
        starts = np.random.randint(len(data) - block, size=size)
        both = torch.from_numpy(data[starts[:, None] + np.arange(block + 1)].astype(np.int64))
        return send(both[:, :-1].contiguous()), send(both[:, 1:].contiguous())

    return gathered if together else sliced


def make_nanogpt(case: dict) -> tuple[Step, int]:
    """nanoGPT's model with the loop of its train.py: its batches, its optimizer, its clipping.

    The loss is read every step; on a GPU, where reading is waiting, every tenth, as it does itself.
    """
    import torch

    sys.path.insert(0, case["path"])
    from model import GPT, GPTConfig

    config = GPTConfig(
        block_size=case["block"],
        vocab_size=case["vocab"],
        n_layer=case["layers"],
        n_head=case["heads"],
        n_embd=case["width"],
        dropout=0.0,
        bias=False,
    )
    if on_gpu(case):
        torch.backends.cuda.matmul.allow_tf32 = True
    model = GPT(config).to(case["device"])
    parameters = sum(each.numel() for each in model.parameters())
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), case["device"])
    runs = torch.compile(model) if case["compile"] else model
    get = batches(case, together=False)
    batch, number = get(), 0

    def step() -> None:
        nonlocal batch, number
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        with autocast(case):
            _, loss = runs(*batch)
        batch = get()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not on_gpu(case) or number % 10 == 0:
            loss.item()
        number += 1

    return step, parameters


def make_llama(case: dict) -> tuple[Step, int]:
    """transformers' Llama with what its Trainer does: fused AdamW, clipping, its own loss, which is looked at every step."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=case["vocab"],
        hidden_size=case["width"],
        intermediate_size=case["d_ff"],
        num_hidden_layers=case["layers"],
        num_attention_heads=case["heads"],
        max_position_embeddings=case["block"],
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train().to(case["device"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    runs = torch.compile(model) if case["compile"] else model
    get = batches(case, together=True)

    def step() -> None:
        tokens, targets = get()
        with autocast(case):
            loss = runs(input_ids=tokens, labels=tokens, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step, sum(each.numel() for each in model.parameters())


def make_litgpt(case: dict) -> tuple[Step, int]:
    """LitGPT's model in Llama's shape, with the loss and optimizer of its pretraining; bf16-mixed gives float32 logits."""
    import torch
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    config = Config(
        block_size=case["block"],
        vocab_size=case["vocab"],
        padded_vocab_size=case["vocab"],
        n_layer=case["layers"],
        n_head=case["heads"],
        n_embd=case["width"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        intermediate_size=case["d_ff"],
    )
    model = GPT(config)
    model.lm_head.weight = model.transformer.wte.weight
    model.to(case["device"])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=on_gpu(case) or None
    )
    runs = torch.compile(model) if case["compile"] else model
    get = batches(case, together=True)

    def step() -> None:
        tokens, targets = get()
        with autocast(case):
            logits = runs(tokens)
        loss = chunked_cross_entropy(logits.float(), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(each.numel() for each in model.parameters())


def train_apt(case: dict) -> None:
    """apt's own trainer as a user runs it, held after each so many steps by a plugin's hook."""
    import numpy as np
    from pydantic import PrivateAttr
    from rich.console import Console

    from apt.core.profile import load_profile
    from apt.core.providers import Plugin, TokenizerProvider
    from apt.core.registry import registry
    from apt.hookspecs import hookimpl
    from apt.training.trainer import Trainer

    class Threes:
        """A token is three letters; ids are spread over the vocabulary."""

        vocab_size = case["vocab"]

        def encode(self, text: str) -> list[int]:
            return self.encode_array(text).tolist()

        def encode_array(self, text: str) -> object:
            letters = np.frombuffer(text.encode(), np.uint8).astype(np.uint32)[: len(text) // 3 * 3] - ord("a")
            first, second, third = letters.reshape(-1, 3).T
            return ((first * 26 + second) * 26 + third) * (case["vocab"] // 26**3) + 3

        def decode(self, ids: object) -> str:
            return ""

        def save(self, folder: Path) -> None:
            pass

    class ThreesProvider(TokenizerProvider):
        """Makes it."""

        api_level: ClassVar[int] = 1

        def train(self, texts: object) -> Threes:
            return Threes()

        def load(self, folder: Path) -> Threes:
            return Threes()

        def get_vocab_size(self) -> int:
            return case["vocab"]

    def pace(model: object) -> Iterator[None]:
        """Goes on after every step; says what the other contestants say, at the same places."""
        for _ in range(case["warm"] - 1):
            yield
        forget(case)
        warming.close()
        say(ready=sum(each.numel() for each in model.parameters()))
        for count in wanted():
            if on_gpu(case):
                yield  # takes the memory again
            start = clock(case)
            for _ in range(count):
                yield
            seconds = clock(case) - start
            rest(case)
            say(seconds=seconds)
        raise _Done

    class Paced(Plugin):
        """Stops the clock, and the run, where the parent says."""

        _pace: list[Iterator[None]] = PrivateAttr(default_factory=list)

        @hookimpl
        def apt_training_start(self, model: object) -> None:
            self._pace.append(pace(model))

        @hookimpl
        def apt_step_end(self) -> None:
            next(self._pace[0])

    warming = contextlib.ExitStack()
    warming.enter_context(seat(case))
    registry.register("tokenizer", "threes", ThreesProvider)
    registry.register("plugin", "paced", Paced)
    with tempfile.TemporaryDirectory() as place, contextlib.suppress(_Done):
        profile = Path(place) / "profile.yaml"
        profile.write_text(json.dumps(case["profile"]))
        loaded = load_profile(profile)
        quiet = Console(file=sys.stderr)
        Trainer(loaded.config, Path(place) / "run", resolved=loaded.resolved, console=quiet).fit()


class _Done(BaseException):
    """The parent wants no more."""


if __name__ == "__main__":
    main()
