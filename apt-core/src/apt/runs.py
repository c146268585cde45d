"""Trained runs, for commands that packages bring: read one, score it, and write what was made of it as a run of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import track
from torch.optim import SGD

from apt.core.config import APTConfig
from apt.core.profile import dump_resolved
from apt.core.resolve import Resolved
from apt.data.batches import num_windows, windows
from apt.data.corpus import require
from apt.data.prepare import Prepared, prepare
from apt.errors import CheckpointError, UserError
from apt.training.card import write_card
from apt.training.checkpoint import IMPORTED, PROFILE, LoadedRun, load_run
from apt.training.evaluate import Score, score
from apt.training.record import Metrics, write_record
from apt.training.snapshot import take_snapshot, write_snapshot
from apt.training.start import Parent

__all__ = ["LoadedRun", "Prepared", "Score", "derive_run", "load_run", "open_text", "score_run", "to_new_folder"]


def open_text(run: LoadedRun, console: Console) -> Prepared:
    """The text that a run was trained on, in tokens; a model that was imported gets that of its profile.

    Raises `CheckpointError` where the profile's source gives another text now, and `DataError` where it gives none.
    """
    text = prepare(run.config, run.resolved, console, run.folder)
    if run.corpus_digest not in (IMPORTED, text.digest):
        raise CheckpointError(
            f"{run.folder}: data.source gives another text now than it was trained on, so nothing of it is known to be held out"
        )
    return text


def score_run(
    run: LoadedRun,
    text: Prepared,
    console: Console,
    *,
    split: Literal["train", "validation", "test"] = "validation",
    max_batches: int | None = None,
    what: str = "scoring",
) -> Score:
    """Score the run's model, as it is now, on a split of its text: all of it, or batches spread evenly over it."""
    part, config = text.splits[split], run.config
    require(part, split, config.max_seq_len)
    size = config.training.batch_size
    whole = -(-num_windows(part, config.max_seq_len) // size)
    batches = track(
        windows(part, config.max_seq_len, size, max_batches),
        what,
        total=whole if max_batches is None else min(whole, max_batches),
        console=console,
        transient=True,
    )
    where = run.model.embedding.weight.device
    return score(run.model, batches, bytes_per_token=part.bytes_per_token, device=where)[0]


def to_new_folder(out: Path) -> Path:
    """`out`, where a run can be written. Raises `UserError` where something is there already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is not empty; give another --out")
    return out


def derive_run(
    run: LoadedRun,
    out: Path,
    *,
    config: APTConfig,
    resolved: Resolved,
    text: Prepared,
    scored: Score,
    changes: Sequence[str],
    results: Mapping[str, object],
) -> Path:
    """Write the run's model, as it is now, as the run `out` that `config` describes; returns its checkpoint.

    It stands at the step of its parent, which is recorded with the `changes` in words. The optimizer remembers nothing: go on
    with ``apt-core branch``. `results` go to the model card.
    """
    parent = Parent.of(run.folder, run.state.step, changes).to_dict()
    to_new_folder(out).mkdir(parents=True, exist_ok=True)
    (out / PROFILE).write_text(dump_resolved(config, resolved), encoding="utf-8")
    parameters = sum(each.numel() for each in run.model.parameters())
    write_record(out, config, resolved, text, parameters, parent=parent)
    metrics = Metrics(out, 0)
    metrics.write(
        "evaluation",
        step=run.state.step,
        epoch=run.state.epoch,
        split="validation",
        loss=scored.loss,
        bits_per_byte=scored.bits_per_byte,
    )
    metrics.close()
    write_card(out, config, resolved, text, {**results, "parameters": f"{parameters:,}", "made from": run.folder})
    snapshot = take_snapshot(
        config=config,
        resolved=resolved,
        model=run.model,
        optimizer=SGD(run.model.parameters()),  # without state
        tokenizer=run.tokenizer,
        state=run.state,
        hooks={},
        corpus_digest=run.corpus_digest,
        progress={"left_out": 0, "best": None, "parent": parent},
        randoms=(),
        copy=False,
    )
    return write_snapshot(out, snapshot)
