"""``apt-core convert tva RUN --rank R``: a trained model's attention, projected to a smaller rank."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(words: Sequence[str]) -> int:
    """Run the command with the words after its name; returns the exit code."""
    parser = argparse.ArgumentParser(prog="apt-core convert", description="Turn a trained model into another kind.")
    commands = parser.add_subparsers(dest="command", required=True)
    tva = commands.add_parser(
        "tva",
        help="project a trained model's attention to rank R",
        description="Project the attention of a trained model (sdpa, flex or flash_v2) to Tri-Vein Attention of rank R, "
        "by the principal components of its own queries, keys and values, and write it as a new run. Its cache has "
        "R / head width of the size. The held-out loss before and after is printed; a short branch of the new run wins part "
        "of the difference back.",
    )
    tva.add_argument("folder", type=Path, metavar="RUN", help="a run's folder, or one of its checkpoints")
    tva.add_argument("--rank", type=int, required=True, metavar="R", help="at most the width of a head")
    tva.add_argument("--out", type=Path, metavar="DIR", help="the new run's folder (default: RUN-tva-R)")
    tva.add_argument(
        "--batches",
        type=int,
        default=16,
        metavar="N",
        help="of the training split that the components are taken of (default: 16)",
    )
    tva.add_argument(
        "--eval-batches",
        type=int,
        metavar="N",
        help="of the validation split that is scored, spread over it (default: as in the run's evaluations)",
    )
    tva.add_argument(
        "--allow-local-code", action="store_true", help="run provider code that the run's profile names by file"
    )
    arguments = parser.parse_args(words)
    from apt_attention_tva.converting import convert_run

    convert_run(
        arguments.folder,
        arguments.rank,
        arguments.out,
        batches=arguments.batches,
        eval_batches=arguments.eval_batches,
        allow_local_code=arguments.allow_local_code,
    )
    return 0
