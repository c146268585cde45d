"""The predecessor's other sections: each key is moved or left out with a note, and what cannot be had is a fault."""

from __future__ import annotations

import pytest

from apt.core.legacy import translate
from apt.core.legacy_run import KEYS, Gone, Moved
from apt.core.profile import SECTIONS
from apt.core.yaml import Source, read_text


def translated(text: str) -> tuple[Source, list[str], list[str]]:
    source, notes, faults = translate(read_text(text, "f.yaml"))
    return source, notes, [str(fault) for fault in faults]


@pytest.mark.parametrize("old", [old for old, what in KEYS.items() if isinstance(what, Moved) and what.to != old])
def test_what_moved_has_a_heir_that_exists_and_leaves_one_note(old: str) -> None:
    moved = KEYS[old]
    assert isinstance(moved, Moved)
    section, key = old.split(".")
    source, notes, faults = translated(f"{section}: {{{key}: true}}\n")
    new_section, new_key = moved.to.split(".")
    assert key not in source.values[section] or old == moved.to  # type: ignore[operator]
    if faults:
        assert "data.train_path" in faults[0]
        return
    assert new_key in source.values[new_section]  # type: ignore[operator]
    assert len(notes) == 1
    assert notes[0].startswith(f"{old} is now {moved.to}")
    if new_section in SECTIONS:
        fields = {*SECTIONS[new_section].model_fields, "gradient_clip"}
        assert new_key in fields


@pytest.mark.parametrize("old", [old for old, what in KEYS.items() if isinstance(what, Gone) and what.harmless is None])
def test_what_is_gone_is_left_out_with_a_note_that_says_what_does_its_work(old: str) -> None:
    section, key = old.split(".")
    source, notes, faults = translated(f"{section}: {{{key}: some, other: 1}}\n")
    assert source.values[section] == {"other": 1}
    assert notes == [f"{old} is left out; today: {KEYS[old].why}"]  # type: ignore[union-attr]
    assert faults == []


def test_values_are_those_of_today() -> None:
    source, notes, _ = translated(
        "training: {mixed_precision: true, gradient_accumulation_steps: 4}\nhardware: {distributed: false}\n"
        "evaluation: {eval_freq: 500, save_best: true}\n"
    )
    assert source.values == {
        "training": {"precision": "bf16", "accumulate": 4, "keep_best": True},
        "hardware": {"parallel": "none"},
        "evaluation": {"eval_every": 500},
    }
    assert "training.mixed_precision is now training.precision" in notes
    assert str(source.origins[("training", "precision")]) == "f.yaml:1:29"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("training: {mixed_precision: half}", "training.mixed_precision: 'half' is not one of True, False"),
        ("training: {save_freq: 5}", "training.save_freq: 5 is not obeyed any more; today: training.save_every"),
        ("data: {loader: sql}", "data.loader: 'sql' is not obeyed any more"),
        ("monitoring: {wandb: {enabled: true}}", "monitoring.wandb: is not obeyed any more; today: monitoring.loggers"),
        ("monitoring: {tensorboard: {enabled: 3}}", "monitoring.tensorboard: {'enabled': 3} is neither true, false"),
        ("training: {max_grad_norm: 1.0, gradient_clip: 2.0}", "contradicts training.gradient_clip: 2.0"),
        ("training: {eval_steps: 5}\nevaluation: 3", "evaluation: 3 is not a mapping"),
    ],
)
def test_what_cannot_be_obeyed_is_a_fault(text: str, fault: str) -> None:
    assert fault in translated(text)[2][0]


@pytest.mark.parametrize(("file", "source"), [("a.jsonl", "jsonl"), ("a.txt", "files")])
def test_the_old_loader_told_json_lines_from_text_by_the_name(file: str, source: str) -> None:
    assert translated(f"data: {{train_path: {file}}}")[0].values["data"] == {"path": file, "source": source}


def test_the_options_of_the_voter_go_to_the_plugin() -> None:
    source, notes, faults = translated("plugins: [moe, voter]\nmodel: {voting: {threshold: 2.2, k: 3}}\n")
    assert source.values == {"plugins": ["moe", {"voter": {"threshold": 2.2, "k": 3}}], "model": {}}
    assert notes == ["model.voting is now the options of the plugin: plugins: [{voter: ...}]"]
    assert faults == []
    assert "does not list the plugin 'voter'" in translated("model: {voting: {k: 3}}")[2][0]


def test_todays_tensorboard_is_left_as_it_is() -> None:
    source, notes, faults = translated("monitoring: {tensorboard: true}\n")
    assert source.values == {"monitoring": {"tensorboard": True}}
    assert (notes, faults) == ([], [])
