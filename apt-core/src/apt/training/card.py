"""What a run's folder says to a person: the model card, and the samples over time."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from apt.core.config import APTConfig
from apt.core.resolve import Resolved
from apt.data.prepare import Prepared
from apt.training.evaluate import Score
from apt.training.record import CARD, METRICS, PLOT, RECORD, provider_lines, read_metrics
from apt.training.snapshot import local_code

SAMPLES = "samples.md"


def write_samples(folder: Path) -> None:
    """All samples that the run has recorded, one below the other."""
    lines = ["# Samples", "", f"Drawn at each evaluation, the same way each time; from `{METRICS}`."]
    for event in read_metrics(folder):
        if event["event"] == "sample":
            text = str(event["text"])
            fence = "`" * max(3, 1 + max((len(run) for run in _runs(text)), default=0))
            lines += ["", f"## Step {event['step']}", "", f"{fence}text", text, fence]
    (folder / SAMPLES).write_text("\n".join(lines) + "\n", encoding="utf-8")


def list_results(step: int, scored: Score, parent: Mapping[str, object] | None) -> dict[str, object]:
    """What the card tells of a run's end; one that was stopped may not have come to a held-out loss."""
    results: dict[str, object] = {"steps": step}
    if scored.num_tokens:
        results["held-out loss (nats a token)"] = f"{scored.loss:.4f}"
        results["held-out bits a byte"] = f"{scored.bits_per_byte:.4f}"
    if parent is not None:
        results["branched from"] = f"{parent['run']}, {parent['checkpoint']}"
    return results


def to_generate(folder: Path, config: APTConfig, resolved: Resolved) -> str:
    """What follows the command's name to let the run's model write."""
    leave = ["--allow-local-code"] if local_code(resolved) else []
    return shlex.join(["generate", str(folder), *leave, "--prompt", config.evaluation.sample_prompt or "Once"])


def write_card(
    folder: Path, config: APTConfig, resolved: Resolved, corpus: Prepared | None, results: Mapping[str, object]
) -> None:
    """The model card (Mitchell et al. 2019, arXiv:1810.03993), as far as a program can write one.

    `corpus` is None where the model was trained elsewhere.
    """
    numbers = "\n".join(f"| {name} | {value} |" for name, value in results.items())
    providers = "\n".join(f"| {line} |" for line in provider_lines(resolved.resolutions, " | "))
    text = f"""\
# {config.name}

{config.description or "A language model trained with apt-core."}

## Results

| what | value |
| --- | --- |
{numbers}

{_HELD_OUT if corpus else ""}{_PICTURE if (folder / PLOT).is_file() else ""}## Use

```console
$ apt-core {to_generate(folder, config, resolved)}
```

```python
from apt.inference.generate import generate
from apt.training.checkpoint import load_run

run = load_run({json.dumps(str(folder))}{", allow_local_code=True" if local_code(resolved) else ""})
print(generate(run.model, run.tokenizer, "Once", max_new_tokens=100, temperature=0.8).text)
```

## Training data

{_describe(config, corpus)}

## Providers

| where | provider | distribution |
| --- | --- | --- |
{providers}

## Limitations

- It repeats what stands in its training data, errors and prejudices too.
- What it writes is not checked.
- It attends to {config.max_seq_len:,} tokens at once; what lies further back it does not know of.
- The figures above are of this source's held-out text; on other text they say little.
- Nothing in it was tuned to follow instructions or to refuse any, unless its data did that.

## Files

`profile/` holds the profile as it was given, `resolved.yaml` with every value, `{RECORD}` and `environment.txt` what it
ran on, `lock.json` the code of each provider by digest, `{METRICS}` every event, `{SAMPLES}` samples over time where they
were asked for, `step-*/` the checkpoints.
"""
    (folder / CARD).write_text(text, encoding="utf-8")


_HELD_OUT = """\
Held out means text of the same source that was not trained on, split off by a hash of the documents' names;
`apt-core evaluate` scores the validation or the test split of it.

"""
_PICTURE = f"""\
![losses and schedules of the run]({PLOT})

"""


def _describe(config: APTConfig, corpus: Prepared | None) -> str:
    """The training data in words."""
    if corpus is None:
        return "Not known here: the model was trained elsewhere and imported."
    tokens = ", ".join(f"{len(split.tokens):,} {name}" for name, split in corpus.splits.items())
    return (
        f"`{config.data.source}`: {corpus.num_documents:,} documents, {corpus.num_bytes:,} bytes; tokens: {tokens}.\n"
        f"SHA-256 of all names and texts:\n`{corpus.digest}`."
    )


def _runs(text: str) -> list[str]:
    """The runs of backticks in a text."""
    return "".join(each if each == "`" else " " for each in text).split()
