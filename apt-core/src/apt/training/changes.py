"""What a resume or a branch may change in a profile, and what it may not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from apt.core.config import APTConfig
from apt.core.profile import to_profile
from apt.errors import CheckpointError


@dataclass(frozen=True)
class Rules:
    """Dotted paths that may not change, with the reason, and those below them that may all the same."""

    refused: Mapping[str, str]
    free: tuple[str, ...]
    told_by_the_text: tuple[str, ...] = ()
    """Where null means what the text gives: whether that is what the number says is known when the text is (`find_place`)."""


_WEIGHTS = "the weights would not fit, or would be those of another model"
_IDS = "the ids would mean other text"

RESUME = Rules(
    {
        "model": _WEIGHTS,
        "plugins": "the parts of the model belong to its plugins",
        "data.tokenizer": _IDS,
        "training.batch_size": "its position in the text would mean another place",
        "training.accumulate": "its position in the text would mean another place",
        "training.steps_per_epoch": "epochs would be counted anew",
        "training.seed": "the order of the text would be another",
        "training.optimizer": "its memory would be of another form",
    },
    ("model.dropout", "model.attention_dropout"),
    ("training.steps_per_epoch",),
)
BRANCH = Rules(
    {"model": _WEIGHTS, "data.tokenizer": _IDS},
    (
        *("model.dropout", "model.attention_dropout", "model.max_seq_len"),
        *("model.attention", "model.ffn", "model.align", "model.retrieval"),
    ),
)
"""Providers may change where the weights still fit, which loading them shows; batches and text where epochs stay as long."""


def check_changes(folder: Path, saved: APTConfig, now: APTConfig, rules: Rules) -> list[str]:
    """One line for each value that differs and may. Raises `CheckpointError` with all that may not."""
    allowed: list[str] = []
    refused: list[str] = []
    before, after = (dict(_leaves(to_profile(each))) for each in (saved, now))
    for path in sorted({**before, **after}):
        old, new = before.get(path), after.get(path)
        filled = {} in (old, new) and any(each != path and _is_below(each, path) for each in (*before, *after))
        if old == new or filled:  # of a section that was empty, its values say what changed
            continue
        reason = next((why for prefix, why in rules.refused.items() if _is_below(path, prefix)), None)
        line = f"{path}: {old!r} -> {new!r}"
        later = path in rules.told_by_the_text and None in (old, new)
        if reason is None or later or any(_is_below(path, each) for each in rules.free):
            allowed.append(line)
        else:
            refused.append(f"{line} ({reason})")
    if refused:
        more = "".join(f"\n  allowed: {line}" for line in allowed)
        listed = "".join(f"\n  refused: {line}" for line in refused)
        raise CheckpointError(
            f"{folder}: the profile has changed since, and this run cannot go on with it:{listed}{more}"
        )
    return allowed


def _is_below(path: str, prefix: str) -> bool:
    return f"{path}.".startswith(f"{prefix}.")


def _leaves(values: Mapping[str, object], above: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        path = f"{above}.{key}" if above else key
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, path)
        else:
            yield path, value
