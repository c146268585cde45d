"""Where in its text a run goes on: nothing is read twice in a pass because batches, windows or the text are others now.

A place is a number of micro-batches, and means the windows that those held. What a trainer keeps of it is how many steps' worth
of text it is ahead of the step's number (`left_out`), which is negative where a branch's steps read more than its trunk's did.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apt.core.config import APTConfig
from apt.data.batches import Batches, make_batches
from apt.data.corpus import first_batch, steps_before
from apt.data.pairs import PairBatches
from apt.errors import CheckpointError
from apt.training.assembly import Assembly


def find_place(
    folder: Path, saved: Mapping[str, Any], before: APTConfig, now: APTConfig, parts: Assembly
) -> tuple[int, str | None]:
    """How many steps' worth of text a run from `folder` is ahead of its step's number, and a line where its place is another.

    Raises `CheckpointError` where its epochs would have another length than those that are counted already.
    """
    step, left_out, steps = saved["step"], saved["progress"]["left_out"], saved["progress"].get("steps_per_epoch")
    if step and steps not in (None, parts.steps_per_epoch):
        raise CheckpointError(
            f"{folder}: an epoch has had {steps} steps so far, and has {parts.steps_per_epoch} with this profile's text and "
            f"batches, so epochs would be counted anew; set training.steps_per_epoch={steps}, or keep text, max_seq_len, "
            "batch_size and accumulate as they were"
        )
    batches = parts.batches
    if saved["corpus"] != parts.corpus.digest:
        return -step, "the other text is read from its beginning" if step else None
    old = make_batches(batches.split, before)
    index = first_batch(before, old.batches_per_pass, step + left_out)
    if (before.max_seq_len, before.training.seed) != (now.max_seq_len, now.training.seed):
        number = -(-index // old.batches_per_pass)
        place, line = number * batches.batches_per_pass, f"other windows of the text are read: pass {number} begins"
    elif (before.training.batch_size, before.training.accumulate) != (now.training.batch_size, now.training.accumulate):
        place, line = translate(index, old, batches), "its batches are others; they go on where the text was left"
    else:  # the same place, though what is an epoch may be said otherwise
        place, line = index, None
    return steps_before(now, batches.batches_per_pass, place) - step, line


def translate(index: int, old: Batches | PairBatches, new: Batches | PairBatches) -> int:
    """How many micro-batches of `new` hold what `index` of `old` held, both of one text in one order; rounded up."""
    number, within = divmod(index, old.batches_per_pass)
    held = -(-within * old.batch_size // new.batch_size)
    return number * new.batches_per_pass + min(held, new.batches_per_pass)
