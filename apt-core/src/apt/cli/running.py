"""Commands that run a model: train, generate, evaluate. PyTorch is imported when one of them runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from apt.cli.options import add_profile_options


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands of this module."""
    train = commands.add_parser("train", help="train the model that a profile describes")
    add_profile_options(train, positional=False)
    train.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/<name>-<start time>)")
    train.add_argument(
        "--resume",
        default="never",
        metavar="auto|PATH|never",
        help="go on from the newest checkpoint in --out, or from this one (default: never)",
    )
    train.set_defaults(run=_train)

    generate = commands.add_parser("generate", help="let a trained model write")
    generate.add_argument("folder", type=Path, metavar="RUN", help="a run's folder, or one of its checkpoints")
    generate.add_argument("--prompt", required=True, help="the text to go on from")
    generate.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="default: 200")
    generate.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy (default: 0.8)")
    generate.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    generate.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the likeliest tokens that hold this share"
    )
    generate.add_argument("--seed", type=int, default=0, help="default: 0")
    generate.add_argument("--rag", type=Path, metavar="FOLDER", help="put passages from these texts before the prompt")
    _allow_local_code(generate)
    generate.set_defaults(run=_generate)

    evaluate = commands.add_parser("evaluate", help="score a trained model on held-out text")
    evaluate.add_argument("folder", type=Path, metavar="RUN", help="a run's folder, or one of its checkpoints")
    evaluate.add_argument("--split", choices=("validation", "test"), default="validation")
    _allow_local_code(evaluate)
    evaluate.set_defaults(run=_evaluate)


def _allow_local_code(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-local-code", action="store_true", help="run provider code that the run's profile names by file"
    )
