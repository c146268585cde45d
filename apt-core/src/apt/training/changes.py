"""What a resume may change in a profile, and what it may not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from apt.core.config import APTConfig
from apt.core.profile import to_profile
from apt.errors import CheckpointError

REFUSED = {
    "model": "the weights would not fit, or would be those of another model",
    "plugins": "the parts of the model belong to its plugins",
    "data.tokenizer": "the ids would mean other text",
    "training.batch_size": "its position in the text would mean another place",
    "training.accumulate": "its position in the text would mean another place",
    "training.steps_per_epoch": "epochs would be counted anew",
    "training.seed": "the order of the text would be another",
}
FREE = ("model.dropout", "model.attention_dropout")
"""What lies below a refused section and may change all the same."""


def check_changes(folder: Path, saved: APTConfig, now: APTConfig) -> list[str]:
    """One line for each value that differs and may. Raises `CheckpointError` with all that may not."""
    allowed: list[str] = []
    refused: list[str] = []
    before, after = (dict(_leaves(to_profile(each))) for each in (saved, now))
    for path in sorted({**before, **after}):
        old, new = before.get(path), after.get(path)
        if old == new:
            continue
        reason = next((why for prefix, why in REFUSED.items() if f"{path}.".startswith(f"{prefix}.")), None)
        line = f"{path}: {old!r} -> {new!r}"
        if reason is None or path in FREE:
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


def _leaves(values: Mapping[str, object], above: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        path = f"{above}.{key}" if above else key
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, path)
        else:
            yield path, value
