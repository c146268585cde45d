"""Commands that run a model: train, branch, generate, evaluate, plot. PyTorch is imported when one of them runs."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from apt.cli.options import add_changes, add_profile_options, print_notes, read_profile
from apt.cli.show import called_as, print_providers, written
from apt.cli.unread import outlive_readers
from apt.errors import AptError, UserError

if TYPE_CHECKING:
    import torch

    from apt.core.hooks import HookRunner
    from apt.core.profile import Profile
    from apt.training.checkpoint import LoadedRun
    from apt.training.evaluate import Score

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

    branch = commands.add_parser(
        "branch",
        help="start a new run from a checkpoint of another",
        description="Start a new run from a checkpoint of another, with a changed profile. The parent is recorded.",
    )
    add_run(branch)
    branch.add_argument("--at", type=int, metavar="STEP", help="the step of the checkpoint (default: the newest)")
    add_changes(branch)
    branch.add_argument(
        "--out", type=Path, metavar="DIR", help="the new run's folder (default: runs/<name>-<start time>)"
    )
    branch.set_defaults(run=_branch)

    generate = commands.add_parser(
        "generate",
        help="let a trained model write",
        description="Let a trained model go on from a prompt, or several. The same seed gives the same text.",
    )
    add_run(generate)
    generate.add_argument(
        "--prompt",
        dest="prompts",
        action="append",
        required=True,
        metavar="TEXT",
        help="the text to go on from; several are read and written together",
    )
    add_sampling(generate, max_new_tokens=200)
    add_place(generate)
    add_compile(generate)
    add_weights(generate)
    generate.add_argument(
        "--rag", type=Path, metavar="FOLDER", help="put passages from these texts before the prompt (needs apt-rag)"
    )
    generate.set_defaults(run=_generate)

    evaluate = commands.add_parser(
        "evaluate",
        help="score a trained model on held-out text",
        description="Score a trained model on the whole of a held-out split of the text that it was trained on: "
        "nats a token, and bits per byte, which compares models whatever their tokens. With --dtype or --quantize it is "
        "scored in float32 and again in fewer bits.",
    )
    add_run(evaluate)
    evaluate.add_argument("--split", choices=("validation", "test"), default="validation", help="default: validation")
    add_place(evaluate)
    add_weights(evaluate)
    evaluate.set_defaults(run=_evaluate)

    plot = commands.add_parser(
        "plot",
        help="draw runs: losses, scheduled values, expert load, switches",
        description="Draw a run, finished or not, or several in one picture: losses, learning rate, scheduled values, what "
        "evaluations measured, and when what was switched on.",
    )
    plot.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="a run's folder; several are compared")
    plot.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="a .png or .svg file (default: loss.png in the run, comparison.png here for several)",
    )
    plot.set_defaults(run=_plot)


def add_run(parser: argparse.ArgumentParser) -> None:
    """The run that a command works on, and what may be asked of its providers."""
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run's folder, or one of its checkpoints")
    parser.add_argument(
        "--allow-local-code", action="store_true", help="run provider code that the run's profile names by file"
    )
    _add_strict_lock(parser)


def add_sampling(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    """How tokens are drawn."""
    default = f"default: {max_new_tokens}"
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help=default)
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy (default: 0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that hold this share")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")


def add_place(parser: argparse.ArgumentParser) -> None:
    """Where the model runs, and in how many bits."""
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="default: auto, the GPU where there is one, but the CPU with --quantize",
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of weights and activations")
    parser.add_argument(
        "--quantize", choices=("int8",), help="eight bits for the linear layers, head included: the fastest on a CPU"
    )


def add_compile(parser: argparse.ArgumentParser) -> None:
    """Whether the writing of a token is compiled."""
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the writing of a token: worth it for long texts (needs a C++ compiler)",
    )


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Which of the weights that a checkpoint holds are used."""
    parser.add_argument(
        "--weights",
        default="trained",
        metavar="NAME",
        help="another set of weights that the checkpoint holds, such as ema, their average (default: trained)",
    )


def _add_strict_lock(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--strict-lock", action="store_true", help="refuse where a provider is not exactly the one that trained the run"
    )


def _train(arguments: argparse.Namespace) -> int:
    _let_one_rank_speak()
    if arguments.resume == "auto" and arguments.out is None:
        raise UserError("--resume auto: says not which run to go on with; give its folder as --out, or --resume PATH")
    profile = read_profile(arguments)
    out = arguments.out or _default_out(profile.config.name, arguments.resume)
    return _run(profile, out, again=_again(arguments, out), resume=arguments.resume, strict_lock=arguments.strict_lock)


def _again(arguments: argparse.Namespace, out: Path) -> str:
    """The command that goes on with a run: as it was given, but from its newest checkpoint."""
    words = ["train", "-p", str(arguments.profile)]
    words += [word for each in arguments.sets for word in ("--set", each)]
    words += [] if arguments.plugins is None else ["--plugins", *arguments.plugins]
    return _going_on(words, arguments, out)


def _going_on(words: list[str], arguments: argparse.Namespace, out: Path) -> str:
    """A command that goes on in `out`, with the leave that was given, on as many processes."""
    words = [*words, *(["--allow-local-code"] if arguments.allow_local_code else [])]
    words += ["--strict-lock"] if arguments.strict_lock else []
    size = int(os.environ.get("WORLD_SIZE", "1"))
    called = called_as() if size == 1 else f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']} -m apt"
    return f"{called} {shlex.join([*words, '--resume', 'auto', '--out', str(out)])}"


def _branch(arguments: argparse.Namespace) -> int:
    _let_one_rank_speak()
    from apt.core.profile import read_resolved
    from apt.core.resolve import resolve_config
    from apt.training.checkpoint import PROFILE
    from apt.training.start import find_step

    checkpoint = find_step(arguments.folder, arguments.at)
    changed = read_resolved(
        checkpoint / PROFILE,
        allow_local_code=arguments.allow_local_code,
        sets=arguments.sets,
        plugins=arguments.plugins,
    )
    profile = replace(changed, resolved=resolve_config(changed.config))
    out = arguments.out or _default_out(profile.config.name, "never")
    again = _going_on(["train", "-p", str(out / PROFILE)], arguments, out)
    return _run(profile, out, again=again, branch=checkpoint, strict_lock=arguments.strict_lock)


def _let_one_rank_speak() -> None:
    """Of the processes that torchrun started one speaks; errors of the others are told all the same."""
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


@outlive_readers()
def _run(
    profile: Profile,
    out: Path,
    *,
    again: str | None = None,
    resume: str = "never",
    branch: Path | None = None,
    strict_lock: bool = False,
) -> int:
    """Train, and let the model that comes of it write a little."""
    print_notes(profile)
    assert profile.resolved is not None
    print_providers(profile.resolved.resolutions)
    print()
    from apt.training.trainer import Trainer

    result = Trainer(
        profile.config,
        out,
        resolved=profile.resolved,
        resume=resume,
        branch=branch,
        strict_lock=strict_lock,
        given=profile.files,
        again=again,
    ).fit()
    if os.environ.get("RANK", "0") == "0":
        _point_to(result.folder)
    if result.interrupted:
        return 130
    if os.environ.get("RANK", "0") != "0":
        return 0
    from apt.training.card import to_generate
    from apt.training.sample import draw_sample

    evaluation = profile.config.evaluation
    scored = result.validation
    print(f"\nheld-out loss: {scored.loss:.4f} nats a token, {scored.bits_per_byte:.4f} bits per byte\n")
    print_providers(result.resolved.resolutions)
    if evaluation.sample_tokens:
        try:
            text = draw_sample(profile.config, result.resolved, result.model, result.tokenizer, result.state)
            (result.folder / "sample.txt").write_text(text, encoding="utf-8")
            print(f"\nsample:\n{written(text)}")
        except AptError as error:  # the run itself is good
            print(f"\nno sample is drawn: {error}")
    print(f"\nrun:  {result.folder}")
    if result.plot is not None:
        print(f"plot: {result.plot}")
    print(f"next: {called_as()} {to_generate(result.folder, profile.config, result.resolved)}")
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
        from apt.training.checkpoint import is_checkpoint

        given = Path(resume)
        if not is_checkpoint(given):
            return given
        return given.parent if given.name not in ("", "..") else given.resolve().parent
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def load(arguments: argparse.Namespace) -> LoadedRun:
    """The run that the options name."""
    from apt.training.checkpoint import load_run

    return load_run(arguments.folder, allow_local_code=arguments.allow_local_code, strict_lock=arguments.strict_lock)


def load_weights(arguments: argparse.Namespace) -> LoadedRun:
    """The run that the options name, with the weights that they name."""
    run = load(arguments)
    from apt.training.weights import use_weights

    use_weights(run.folder, run.model, arguments.weights)
    return run


def load_in_place(arguments: argparse.Namespace, *, prepared: bool = False, compiled: bool = False) -> LoadedRun:
    """The run that the options name, with the weights that they name, where they say; `prepared` in their precision too."""
    run = load_weights(arguments)
    from apt.inference.prepare import check_device, get_ready
    from apt.training.assembly import pick_device

    asked = "cpu" if arguments.device == "auto" and arguments.quantize is not None else arguments.device
    where = pick_device(asked, "--device")
    check_device(arguments.quantize, where)
    if prepared:  # before it goes there, where the weights as they are saved may not have room
        prepare_run(run, arguments, where, compiled=compiled)
    run.model.to(where)
    if compiled:
        from rich.console import Console

        with Console(stderr=True).status("compiling the writing of a token, which is kept for the next time"):
            get_ready(run.model)
    return run


def prepare_run(
    run: LoadedRun, arguments: argparse.Namespace, where: torch.device | None = None, *, compiled: bool = False
) -> None:
    """Change the run's model to the precision that was asked for."""
    from apt.inference.prepare import prepare

    share = prepare(run.model, dtype=arguments.dtype, quantize=arguments.quantize, compiled=compiled, device=where)
    if arguments.quantize is not None:
        print(f"{share:.0%} of the weights that a token meets are in {arguments.quantize}", file=sys.stderr)


def _generate(arguments: argparse.Namespace) -> int:
    run = load_in_place(arguments, prepared=True, compiled=arguments.compile)
    from apt.inference.generate import generate, generate_batch

    prompts: list[str] = arguments.prompts
    options = {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}
    options |= {"special": run.special, "hooks": hooks_of(run, arguments.rag), "state": run.state}
    # A decoder goes on from its prompt; an encoder-decoder's prompt is a source, and what it writes is a text of its own.
    shown = [""] * len(prompts) if run.config.architecture == "encoder_decoder" else prompts
    unsaid = [shown[0]]

    def show(text: str) -> None:
        # The prompt goes first, but not before there is something to go on with: what is refused prints nothing.
        print(*unsaid, written(text), sep="", end="", flush=True)
        unsaid.clear()

    if len(prompts) == 1:
        results = [generate(run.model, run.tokenizer, prompts[0], **options, show=show)]
        print(*unsaid)
    else:
        results = generate_batch(run.model, run.tokenizer, prompts, **options)
        for number, (prompt, result) in enumerate(zip(shown, results, strict=True), 1):
            print(f"[{number}] {prompt}{written(result.text)}")
    for number, result in enumerate(results, 1):
        which = f"[{number}] " if len(results) > 1 else ""
        if result.sources:
            print(f"{which}passages from: {', '.join(result.sources)}", file=sys.stderr)
        elif arguments.rag is not None:
            print(
                f"{which}warning: no passage of {arguments.rag} was used: none bears on the prompt, or none fits in the "
                f"{run.model.max_seq_len // 2} characters that are half of the model's context",
                file=sys.stderr,
            )
        if result.left_out:
            room = run.model.max_seq_len
            end, among = "first", ", the passages' before all others," if result.sources else ""
            if run.config.architecture == "encoder_decoder":  # of a source the start is read
                end, among = "last", ""
            print(
                f"{which}the {end} {result.left_out} tokens{among} did not fit in the model's context of {room}",
                file=sys.stderr,
            )
    return 0


def hooks_of(run: LoadedRun, rag: Path | None = None) -> HookRunner:
    """Those of the run's plugins that were on, and retrieval from `rag`."""
    from apt.core.hooks import HookRunner
    from apt.core.registry import registry

    plugins = run.resolved.plugins_of(run.state.plugins_on)
    if rag is not None:
        # Passages may take half of the context; the prompt and what follows it need the rest.
        room = run.model.max_seq_len // 2
        options = {"folder": str(rag), "max_chars": room}
        plugins["rag"] = registry.get("plugin", "rag", options, fallback=False)  # type: ignore[assignment]
    return HookRunner(plugins)


def _evaluate(arguments: argparse.Namespace) -> int:
    run = load_in_place(arguments)
    from rich.console import Console

    from apt.runs import open_text, score_run
    from apt.training.calibration import calibration_of
    from apt.training.checkpoint import IMPORTED

    console = Console(stderr=True)
    text = open_text(run, console)
    if run.corpus_digest == IMPORTED:
        print("the model was trained elsewhere: it is not known whether it has seen this text", file=sys.stderr)

    def scored_by(what: str) -> Score:
        with calibration_of(run.folder).applied():
            return score_run(run, text, console, split=arguments.split, what=f"scoring {what}")

    scored = scored_by(f"the {arguments.split} split")
    print(
        f"{arguments.split}: {scored.loss:.4f} nats a token, {scored.bits_per_byte:.4f} bits per byte "
        f"({scored.num_tokens:,} tokens, step {run.state.step})"
    )
    if arguments.quantize is not None or arguments.dtype != "fp32":
        changed = arguments.quantize or arguments.dtype
        prepare_run(run, arguments)
        again = scored_by(f"it again in {changed}")
        print(f"in {changed}: {again.loss:.4f} nats a token, {again.loss - scored.loss:+.4f}")
    return 0


def _plot(arguments: argparse.Namespace) -> int:
    from apt.training.plot import plot_runs

    print(plot_runs(arguments.folders, arguments.out))
    return 0
