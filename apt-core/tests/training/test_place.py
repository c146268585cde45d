"""A branch may read its text in other batches: it goes on where its trunk stood."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from apt.core.profile import load_profile
from apt.data.batches import Batches
from apt.data.tokens import TokenSplit
from apt.errors import CheckpointError
from apt.hookspecs import Batch, RunState
from apt.training.place import translate
from apt.training.step import Step
from apt.training.trainer import Trainer

SEQ = 4


def windows_of(batches: Batches, indices: range) -> list[int]:
    """The first token of each window; tokens are their own places."""
    return [int(row[0]) for index in indices for row in batches.get(index).tokens]


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.data())
def test_no_window_is_read_twice_in_a_pass_and_less_than_a_batch_is_left_out(
    windows: int, before: int, now: int, data: st.DataObject
) -> None:
    split = TokenSplit(np.arange(windows * SEQ + 1, dtype="<u2"), 0, 1)
    old, new = (Batches(split, SEQ, min(size, windows), 0) for size in (before, now))
    number, within = data.draw(st.integers(0, 2)), data.draw(st.integers(0, old.batches_per_pass - 1))
    place = translate(number * old.batches_per_pass + within, old, new)
    end = (number + 1) * new.batches_per_pass
    assert number * new.batches_per_pass <= place <= end
    read = windows_of(old, range(number * old.batches_per_pass, number * old.batches_per_pass + within))
    rest = windows_of(new, range(place, end))
    assert len({*read, *rest}) == len(read) + len(rest)
    assert windows - len(read) - len(rest) < 2 * new.batch_size


def train(profile: Path, out: Path, *sets: str, console: Console | None = None, **options: Any) -> Trainer:
    loaded = load_profile(profile, sets=sets)
    quiet = Console(file=io.StringIO()) if console is None else console
    trainer = Trainer(loaded.config, out, resolved=loaded.resolved, console=quiet, **options)
    trainer.fit()
    return trainer


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the micro-batches that are read from now on, in training."""
    numbers: list[int] = []
    take = Step._batch

    def listen(self: Step, state: RunState, index: int) -> Batch:
        numbers.append(index)
        return take(self, state, index)

    monkeypatch.setattr(Step, "_batch", listen)
    return numbers


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        ((), [6, 7, 8, 9]),
        (("training.accumulate=1",), [6, 7]),
        (("training.batch_size=4",), [4, 5, 6, 7]),
        (("training.batch_size=3", "training.accumulate=1"), [4, 5]),
    ],
)
def test_other_batches_go_on_where_the_text_was_left(
    profile_file: Path, tmp_path: Path, seen: list[int], sets: tuple[str, ...], expected: list[int]
) -> None:
    trunk = ("training.accumulate=2", "training.max_epochs=null")
    train(profile_file, tmp_path / "trunk", *trunk, "training.max_steps=3")
    assert seen == [0, 1, 2, 3, 4, 5]
    seen.clear()
    out = tmp_path / "branch"
    train(profile_file, out, *trunk, *sets, "training.max_steps=4", branch=tmp_path / "trunk" / "step-000003")
    train(profile_file, out, *trunk, *sets, "training.max_steps=5", resume="auto")
    assert seen == expected


def test_other_windows_begin_a_pass_and_another_text_its_first(
    profile_file: Path, tmp_path: Path, seen: list[int]
) -> None:
    train(profile_file, tmp_path / "trunk", "training.max_steps=3")
    checkpoint, output = tmp_path / "trunk" / "step-000003", io.StringIO()
    seen.clear()
    options = {"branch": checkpoint, "console": Console(file=output, width=1000)}
    trainer = train(profile_file, tmp_path / "longer", "model.max_seq_len=8", "training.max_steps=4", **options)
    assert seen == [trainer.parts.batches.batches_per_pass]
    assert "other windows of the text are read: pass 1 begins" in output.getvalue()
    other = tmp_path / "other.txt"
    other.write_text("something else " * 500)
    seen.clear()
    train(profile_file, tmp_path / "other", f"data.path={other}", "training.max_steps=4", **options)
    assert seen == [0]
    assert "the other text is read from its beginning" in output.getvalue()


def test_epochs_keep_their_length(profile_file: Path, tmp_path: Path) -> None:
    free = ("training.steps_per_epoch=null", "training.max_epochs=null", "training.save_every=5")
    train(profile_file, tmp_path / "trunk", *free, "training.max_steps=5")
    checkpoint, more = tmp_path / "trunk" / "step-000005", (*free, "training.max_steps=7")
    changed = (*more, "training.batch_size=4")
    with pytest.raises(CheckpointError, match=r"step-000005: an epoch has had \d+ steps so far, and has") as caught:
        train(profile_file, tmp_path / "no", *changed, branch=checkpoint)
    assert not (tmp_path / "no").exists()
    found = re.search(r"set (training.steps_per_epoch=\d+)", str(caught.value))
    assert found is not None
    assert train(profile_file, tmp_path / "yes", *changed, found[1], branch=checkpoint).state.step == 7


@pytest.mark.parametrize("goes_on", ["resume", "branch"])
def test_the_length_of_an_epoch_may_be_said_as_it_was_and_nothing_is_read_twice(
    profile_file: Path, tmp_path: Path, seen: list[int], goes_on: str
) -> None:
    sets = ("training.max_epochs=null", "training.accumulate=2", "training.batch_size=60")
    free, said = (*sets, "training.steps_per_epoch=null"), (*sets, "training.steps_per_epoch=1")

    def go_on(name: str, *sets: str, after: str) -> Trainer:
        if goes_on == "resume":
            return train(profile_file, tmp_path / "run", *sets, resume="auto")
        return train(profile_file, tmp_path / name, *sets, branch=next((tmp_path / after).glob("step-*")))

    keep = "training.keep_last=1"
    first = train(profile_file, tmp_path / "run", *free, "training.max_steps=2", keep)
    assert first.parts.batches.batches_per_pass == 3
    go_on("said", *said, "training.max_steps=4", keep, after="run")
    go_on("free", *free, "training.max_steps=5", keep, after="said")
    assert seen == [0, 1, 3, 4, 6, 7, 8, 9, 12, 13]
    with pytest.raises(
        CheckpointError, match=r"an epoch has had 1 steps so far, and has 2 with|\(epochs would be counted"
    ):
        go_on("no", *sets, "training.steps_per_epoch=2", "training.max_steps=6", after="free")
