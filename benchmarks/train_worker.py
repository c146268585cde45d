"""One contestant of `benchmarks/train.py`: trains a model in a process of its own, so many steps at a time.

``python train_worker.py CASE`` where CASE is a JSON object; it runs in the contestant's own interpreter and imports nothing of
apt unless the contestant is apt. Lines on standard output: {"ready": parameters} when it is warm; for each number read from
standard input, so many steps and {"seconds": s}; at the end of input {"peak_mb": m}.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

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
        step, parameters = {"nanogpt": make_nanogpt, "llama": make_llama, "litgpt": make_litgpt}[case["kind"]](case)
        for _ in range(case["warm"]):
            step()
        say(ready=parameters)
        for count in wanted():
            start = time.perf_counter()
            for _ in range(count):
                step()
            say(seconds=time.perf_counter() - start)
    say(peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def say(**values: object) -> None:
    """One line to the parent."""
    OUT.write(json.dumps(values) + "\n")


def wanted() -> Iterator[int]:
    """How many steps are asked for, again and again."""
    for line in sys.stdin:
        yield int(line)


def batches(case: dict, together: bool) -> Callable[[], tuple]:
    """Windows at random places of a memory map: sliced one by one as nanoGPT does, or gathered at once."""
    import numpy as np
    import torch

    block, size = case["block"], case["batch"]

    def sliced() -> tuple:
        data = np.memmap(case["data"], dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - block, (size,))
        x = torch.stack([torch.from_numpy(data[i : i + block].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + block].astype(np.int64)) for i in starts])
        return x, y

    data = np.memmap(case["data"], dtype=np.uint16, mode="r")

    def gathered() -> tuple:
        starts = np.random.randint(len(data) - block, size=size)
        both = torch.from_numpy(data[starts[:, None] + np.arange(block + 1)].astype(np.int64))
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()

    return gathered if together else sliced


def make_nanogpt(case: dict) -> tuple[Step, int]:
    """nanoGPT's model with the loop of its train.py: its batches, its optimizer, its clipping, a loss read every step."""
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
    model = GPT(config)
    parameters = sum(each.numel() for each in model.parameters())
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    runs = torch.compile(model) if case["compile"] else model
    get = batches(case, together=False)
    batch = get()

    def step() -> None:
        nonlocal batch
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        _, loss = runs(*batch)
        batch = get()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step, parameters


def make_llama(case: dict) -> tuple[Step, int]:
    """transformers' Llama with what its Trainer does: fused AdamW, clipping, its own loss."""
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
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    runs = torch.compile(model) if case["compile"] else model
    get = batches(case, together=True)

    def step() -> None:
        tokens, targets = get()
        loss = runs(input_ids=tokens, labels=tokens, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step, sum(each.numel() for each in model.parameters())


def make_litgpt(case: dict) -> tuple[Step, int]:
    """LitGPT's model in Llama's shape, with the loss and optimizer of its pretraining."""
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    runs = torch.compile(model) if case["compile"] else model
    get = batches(case, together=True)

    def step() -> None:
        tokens, targets = get()
        loss = chunked_cross_entropy(runs(tokens), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(each.numel() for each in model.parameters())


def train_apt(case: dict) -> None:
    """apt's own trainer as a user runs it, held after each so many steps by a plugin's hook."""
    from pydantic import PrivateAttr
    from rich.console import Console

    from apt.core.profile import load_profile
    from apt.core.providers import Plugin
    from apt.core.registry import registry
    from apt.hookspecs import RunState, hookimpl
    from apt.training.trainer import Trainer

    class Paced(Plugin):
        """Stops the clock, and the run, where the parent says."""

        _rest: list[int] = PrivateAttr(default_factory=list)
        _started: list[float] = PrivateAttr(default_factory=list)

        @hookimpl
        def apt_training_start(self) -> None:
            self._rest.append(case["warm"])

        @hookimpl
        def apt_step_end(self, state: RunState, model: object) -> None:
            self._rest[0] -= 1
            if self._rest[0]:
                return
            if self._started:
                say(seconds=time.perf_counter() - self._started.pop())
            else:
                say(ready=sum(each.numel() for each in model.parameters()))
            line = sys.stdin.readline()
            if not line:
                raise _Done
            self._rest[0] = int(line)
            self._started.append(time.perf_counter())

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
