"""The predecessor's sections beside the model, in today's words: what moved, what it is called, and what nothing reads any more.

One table says all of it. A key with a heir moves there with its place in the file; one without is left out, and its note says
what does that work today. What asked for something that cannot be had is a fault.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from apt.core.yaml import Key, Source, Value
from apt.errors import Fault

Convert = Callable[[Value], Value]


@dataclass(frozen=True)
class Moved:
    """A key that another one stands for today; `convert` gives its value there, or raises ValueError saying what fits."""

    to: str
    convert: Convert = lambda value: value


@dataclass(frozen=True)
class Gone:
    """A key that nothing reads: what does its work today; only the values of `harmless`, where given, may be left out."""

    why: str
    harmless: tuple[Value, ...] | None = None


def _one_of(words: Mapping[Value, Value]) -> Convert:
    def convert(value: Value) -> Value:
        if isinstance(value, dict | list) or value not in words:
            raise ValueError(f"{value!r} is not one of {', '.join(map(str, words))}")
        return words[value]

    return convert


def _enabled(value: Value) -> Value:
    """``{enabled: true, log_dir: ...}``, or a plain truth value."""
    enabled = value.get("enabled", False) if isinstance(value, dict) else value
    if not isinstance(enabled, bool):
        raise ValueError(f"{value!r} is neither true, false, nor a mapping with 'enabled'")
    return enabled


KEYS: dict[str, Moved | Gone] = {
    "training.mixed_precision": Moved("training.precision", _one_of({True: "bf16", False: "fp32"})),
    "training.amp_level": Gone("autocast chooses by operation, there are no levels"),
    "training.gradient_accumulation_steps": Moved("training.accumulate"),
    "training.max_grad_norm": Moved("training.gradient_clip"),
    "training.lr_scheduler": Moved("training.lr_schedule"),
    "training.eval_steps": Moved("evaluation.eval_every"),
    "training.save_steps": Moved("training.save_every"),
    "training.logging_steps": Moved("monitoring.log_every"),
    "training.save_freq": Gone("training.save_every, by default once an epoch", harmless=(1,)),
    "training.checkpoint_dir": Gone("train --out DIR says where a run goes"),
    "data.train_path": Moved("data.path"),
    "data.val_path": Gone("the held-out text is split off data.path, 80/10/10 by document"),
    "data.loader": Gone("data.source says what reads the text", harmless=("text_default",)),
    "data.max_length": Gone("windows are as long as model.max_seq_len"),
    "data.truncation": Gone("the text is cut into windows, and none of it is dropped"),
    "data.padding": Gone("windows are full, so there is nothing to pad"),
    "evaluation.metrics": Gone(
        "loss and bits per byte are always computed (perplexity is exp of the loss), nothing else is"
    ),
    "evaluation.eval_freq": Moved("evaluation.eval_every"),
    "evaluation.save_best": Moved("training.keep_best"),
    "monitoring.tensorboard": Moved("monitoring.tensorboard", _enabled),
    "monitoring.wandb": Gone("monitoring.loggers: [{provider: wandb, project: ...}]"),
    "hardware.num_gpus": Gone("torchrun --nproc-per-node N starts a process for each"),
    "hardware.distributed": Moved("hardware.parallel", _one_of({True: "ddp", False: "none"})),
    "hardware.backend": Gone("NCCL on GPUs, gloo elsewhere"),
    "debug.verbose": Gone("APT_TRACE=1 logs each hook"),
    "debug.log_level": Gone("APT_TRACE=1 logs each hook"),
    "debug.profile_memory": Gone("apt-core check foretells the memory"),
    "debug.check_gradients": Gone("every run checks them: the proof of use, and training.on_nonfinite"),
}


def translate_sections(source: Source) -> tuple[list[str], list[Fault]]:
    """Move the old keys of `source` in place; one note for each, and the faults."""
    notes: list[str] = []
    faults: list[Fault] = []
    for old, what in KEYS.items():
        section, key = old.split(".")
        inner = source.values.get(section)
        if not isinstance(inner, dict) or key not in inner:
            continue
        value = inner[key]
        if isinstance(what, Moved):
            if what.to == old and not isinstance(value, dict):
                continue  # today's key, in today's form
            faults += _move(source, (section, key), what, notes)
        elif what.harmless is not None and value not in what.harmless:
            faults.append(Fault(old, f"{value!r} is not obeyed any more", f"today: {what.why}"))
        elif isinstance(value, dict) and value.get("enabled"):
            faults.append(Fault(old, "is not obeyed any more", f"today: {what.why}"))
        else:
            _take(source, section, key)
            notes.append(f"{old} is left out; today: {what.why}")
    if "data.train_path is now data.path" in notes:
        _name_source(source, faults)
    return notes, faults


def _move(source: Source, old: Key, moved: Moved, notes: list[str]) -> list[Fault]:
    value = _take(source, str(old[0]), str(old[1]))
    path = ".".join(map(str, old))
    try:
        value = moved.convert(value)
    except ValueError as error:
        return [Fault(path, str(error), f"today: {moved.to}")]
    section, key = moved.to.split(".")
    present = source.values.get(section)
    if present is not None and not isinstance(present, dict):
        return [Fault(section, f"{present!r} is not a mapping", f"{path} cannot be added to it")]
    inner = dict(present or {})
    if inner.setdefault(key, value) != value:
        return [Fault(path, f"{value!r} contradicts {moved.to}: {inner[key]!r}", "keep one of the two")]
    source.values[section] = inner
    if old in source.origins:
        source.origins.setdefault((section,), source.origins[old])
        source.origins[(section, key)] = source.origins[old]
    notes.append(f"{path} is now {moved.to}" + ("" if path != moved.to else f": {value!r}".lower()))
    return []


def _take(source: Source, section: str, key: str) -> Value:
    inner = source.values[section]
    assert isinstance(inner, dict)
    rest = dict(inner)
    value = rest.pop(key)
    source.values[section] = rest
    return value


def _name_source(source: Source, faults: list[Fault]) -> None:
    """The old loader told JSON Lines from plain text by the file's name."""
    data = source.values["data"]
    assert isinstance(data, dict)
    path = data.get("path")
    if not isinstance(path, str):
        faults.append(Fault("data.train_path", f"{path!r} is not the path of a file"))
        return
    data.setdefault("source", "jsonl" if path.endswith(".jsonl") else "files")
    source.origins.setdefault(("data", "source"), source.origins[("data", "path")])
