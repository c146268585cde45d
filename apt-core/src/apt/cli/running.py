"""Commands that run a model: train, generate, evaluate, plot. PyTorch is imported when one of them runs."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from apt.cli.options import add_profile_options, print_notes, read_profile
from apt.cli.show import called_as, print_providers

if TYPE_CHECKING:
    from apt.core.hooks import HookRunner
    from apt.training.checkpoint import LoadedRun

Commands = argparse._SubParsersAction  # the only name that argparse has for it


def add_commands(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the commands of this module."""
    train = commands.add_parser(
        "train",
        help="train the model that a profile describes",
        description="Train the model that a profile describes, and end with its held-out loss, a sample and a plot. "
        "Ctrl-C saves and leaves; --resume auto goes on to the same bits as if nothing had happened.",
    )
    add_profile_options(train, positional=False)
    train.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/<name>-<start time>)")
    train.add_argument(
        "--resume",
        default="never",
        metavar="auto|PATH|never",
        help="go on from the newest checkpoint in --out, or from this run or checkpoint (default: never)",
    )
    _add_strict_lock(train)
    train.set_defaults(run=_train)

    generate = commands.add_parser(
        "generate",
        help="let a trained model write",
        description="Let a trained model go on from a prompt. The same seed gives the same text.",
    )
    _add_run(generate)
    generate.add_argument("--prompt", required=True, help="the text to go on from")
    generate.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="at most (default: 200)")
    generate.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy (default: 0.8)")
    generate.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    generate.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the likeliest tokens that hold this share"
    )
    generate.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    generate.add_argument(
        "--rag", type=Path, metavar="FOLDER", help="put passages from these texts before the prompt (needs apt-rag)"
    )
    generate.set_defaults(run=_generate)

    evaluate = commands.add_parser(
        "evaluate",
        help="score a trained model on held-out text",
        description="Score a trained model on the whole of a held-out split of the text that it was trained on: "
        "nats a token, and bits per byte, which compares models whatever their tokens.",
    )
    _add_run(evaluate)
    evaluate.add_argument("--split", choices=("validation", "test"), default="validation", help="default: validation")
    evaluate.set_defaults(run=_evaluate)

    plot = commands.add_parser(
        "plot",
        help="draw a run: losses, scheduled values, switches",
        description="Draw a run, finished or not: losses, learning rate, scheduled values, and when what was switched on.",
    )
    plot.add_argument("folder", type=Path, metavar="RUN", help="a run's folder")
    plot.add_argument("--out", type=Path, metavar="FILE", help="a .png or .svg file (default: loss.png in the run)")
    plot.set_defaults(run=_plot)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run's folder, or one of its checkpoints")
    parser.add_argument(
        "--allow-local-code", action="store_true", help="run provider code that the run's profile names by file"
    )
    _add_strict_lock(parser)


def _add_strict_lock(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--strict-lock", action="store_true", help="refuse where a provider is not exactly the one that trained the run"
    )


def _train(arguments: argparse.Namespace) -> int:
    if os.environ.get("RANK", "0") != "0":
        # Of the processes that torchrun started one speaks; errors of the others are told all the same.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    profile = read_profile(arguments)
    print_notes(profile)
    assert profile.resolved is not None
    print_providers(profile.resolved.resolutions)
    print()
    out = arguments.out or _default_out(profile.config.name, arguments.resume)
    from apt.training.trainer import Trainer

    result = Trainer(
        profile.config, out, resolved=profile.resolved, resume=arguments.resume, strict_lock=arguments.strict_lock
    ).fit()
    if os.environ.get("RANK", "0") == "0":
        _point_to(result.folder)
    if result.interrupted:
        return 130
    if os.environ.get("RANK", "0") != "0":
        return 0
    from apt.inference.generate import generate

    evaluation = profile.config.evaluation
    scored = result.validation
    print(f"\nheld-out loss: {scored.loss:.4f} nats a token, {scored.bits_per_byte:.4f} bits per byte\n")
    print_providers(result.resolved.resolutions)
    if evaluation.sample_tokens:
        sample = generate(
            result.model,
            result.tokenizer,
            evaluation.sample_prompt,
            max_new_tokens=evaluation.sample_tokens,
            temperature=0.8,
            state=result.state,
        )
        text = evaluation.sample_prompt + sample.text
        (result.folder / "sample.txt").write_text(text)
        print(f"\nsample:\n{text}")
    print(f"\nrun:  {result.folder}")
    if result.plot is not None:
        print(f"plot: {result.plot}")
    print(f"next: {called_as()} generate {result.folder} --prompt {shlex.quote(evaluation.sample_prompt or 'def ')}")
    return 0


def _point_to(run: Path) -> None:
    """Let ``runs/latest`` mean this run, where it lies in ``runs``."""
    link = Path("runs") / "latest"
    if run.parent != link.parent or run == link or (link.exists() and not link.is_symlink()):
        return
    new = link.with_name(f".latest-{os.getpid()}")
    new.symlink_to(run.name)
    new.replace(link)


def _default_out(name: str, resume: str) -> Path:
    if resume not in ("never", "auto"):
        given = Path(resume)
        return given if (given / "latest").is_file() else given.parent
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _load(arguments: argparse.Namespace) -> LoadedRun:
    from apt.training.checkpoint import load_run

    return load_run(arguments.folder, allow_local_code=arguments.allow_local_code, strict_lock=arguments.strict_lock)


def _generate(arguments: argparse.Namespace) -> int:
    run = _load(arguments)
    from apt.inference.generate import generate

    unsaid = [arguments.prompt]

    def show(text: str) -> None:
        # The prompt goes first, but not before there is something to go on with: what is refused prints nothing.
        print(*unsaid, text, sep="", end="", flush=True)
        unsaid.clear()

    result = generate(
        run.model,
        run.tokenizer,
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        hooks=_hooks(run, arguments.rag),
        state=run.state,
        show=show,
    )
    print(*unsaid)
    if result.sources:
        print(f"passages from: {', '.join(result.sources)}", file=sys.stderr)
    if result.left_out:
        print(
            f"the first {result.left_out} tokens did not fit in the model's context of {run.model.max_seq_len}",
            file=sys.stderr,
        )
    return 0


def _hooks(run: LoadedRun, rag: Path | None) -> HookRunner:
    """The run's plugins that were on, and retrieval from `rag`."""
    from apt.core.hooks import HookRunner
    from apt.core.registry import registry

    plugins = {name: plugin for name, plugin in run.resolved.plugins.items() if name in run.state.plugins_on}
    if rag is not None:
        # Passages may take half of the context; the prompt and what follows it need the rest.
        room = run.model.max_seq_len // 2
        options = {"folder": str(rag), "max_chars": room}
        plugins["rag"] = registry.get("plugin", "rag", options, fallback=False)  # type: ignore[assignment]
    return HookRunner(plugins)


def _evaluate(arguments: argparse.Namespace) -> int:
    run = _load(arguments)
    from rich.console import Console
    from rich.progress import track

    from apt.data.batches import num_windows, windows
    from apt.data.corpus import require
    from apt.data.prepare import prepare
    from apt.errors import CheckpointError
    from apt.training.evaluate import score

    corpus = prepare(run.config, run.resolved, Console(stderr=True), run.folder)
    if corpus.digest != run.corpus_digest:
        raise CheckpointError(
            f"{run.folder}: data.source gives another text now than it was trained on, so nothing of it is known to be held out"
        )
    split = corpus.splits[arguments.split]
    require(split, arguments.split, run.config.max_seq_len)
    seq_len, batch_size = run.config.max_seq_len, run.config.training.batch_size
    batches = track(
        windows(split, seq_len, batch_size),
        f"scoring the {arguments.split} split",
        total=-(-num_windows(split, seq_len) // batch_size),
        console=Console(stderr=True),
        transient=True,
    )
    scored, _ = score(run.model, batches, bytes_per_token=split.bytes_per_token)
    print(
        f"{arguments.split}: {scored.loss:.4f} nats a token, {scored.bits_per_byte:.4f} bits per byte "
        f"({scored.num_tokens:,} tokens, step {run.state.step})"
    )
    return 0


def _plot(arguments: argparse.Namespace) -> int:
    from apt.training.plot import plot_run

    print(plot_run(arguments.folder, arguments.out))
    return 0
