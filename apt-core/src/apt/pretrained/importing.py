"""A pretrained model becomes a run: a folder that generate, evaluate, chat, export and further training take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal, cast

import torch
from torch.optim import SGD

from apt.core import yaml
from apt.core.profile import Profile, load_profile
from apt.core.yaml import Value
from apt.errors import UserError
from apt.hookspecs import RunState
from apt.modeling.compose import ModelBuilder
from apt.pretrained.gguf import open_gguf
from apt.pretrained.llama import from_theirs
from apt.pretrained.sources import Source, open_folder
from apt.runs import to_new_folder
from apt.training.card import write_card
from apt.training.checkpoint import IMPORTED
from apt.training.record import write_record
from apt.training.snapshot import take_snapshot, write_snapshot

PROFILE = "profile.yaml"
"""What further training starts from: `train -p RUN/profile.yaml --resume auto --out RUN`."""
SKIPPED = ("rotary_emb.inv_freq",)
"""Tensors that old checkpoints hold and that follow from the configuration."""

Format = Literal["hf", "gguf"]


def import_model(
    form: Format, path: Path, out: Path, *, sets: Sequence[str] = (), tell: Callable[[str], None] = lambda line: None
) -> Path:
    """Write a run of step 0 with the model and tokenizer of `path`; returns its checkpoint.

    `sets` change the profile (``training.batch_size=4``). Raises `UserError` and its kin where the source is no Llama-family
    model, something of it would be lost, or `out` is not empty.
    """
    to_new_folder(out)
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder")
    with ExitStack() as stack, _emptied(out):
        tell(f"reading {path}")
        source = open_gguf(path) if form == "gguf" else open_folder(path, stack)
        profile = _profile(source, out, form, sets)
        assert profile.resolved is not None
        used: set[str] = set()

        def get(name: str) -> object:
            used.add(name)
            return source.get(name)

        weights = from_theirs(source.shape, get)  # type: ignore[arg-type]
        if profile.config.tie_embeddings and not source.shape.tied:
            raise UserError(f"{path}: has a head of its own, which model.tie_embeddings: true has no place for")
        if source.shape.tied and not profile.config.tie_embeddings:
            weights["head.weight"] = weights["embedding.weight"]
        left = sorted(name for name in source.names - used if not name.endswith(SKIPPED) and not _tied(source, name))
        if left:
            raise UserError(f"{path}: has tensors that this model has no place for: {', '.join(left[:8])}")
        builder = ModelBuilder(profile.config, resolved=profile.resolved)
        with torch.device("meta"):  # before sizes that the tensors have not take their memory
            expected = {name: tuple(weight.shape) for name, weight in builder.build_model().state_dict().items()}
        for name, weight in weights.items():
            if expected.get(name, tuple(weight.shape)) != tuple(weight.shape):
                what = f"is {list(weight.shape)} in its tensors, and {list(expected[name])} by its configuration"
                raise UserError(f"{path}: {name} {what}")
        model = builder.build_model()
        missing, unexpected = model.load_state_dict(weights, strict=False)
        if unexpected or set(missing) - {"head.weight"}:
            raise UserError(f"{path}: does not fit the profile's model: {sorted({*missing, *unexpected})}")
    tell(f"writing {out}")
    parameters = sum(each.numel() for each in model.parameters())
    write_record(out, profile.config, profile.resolved, None, parameters)
    write_card(out, profile.config, profile.resolved, None, {"imported from": path, "parameters": f"{parameters:,}"})
    training = profile.config.training
    snapshot = take_snapshot(
        config=profile.config,
        resolved=profile.resolved,
        model=model,
        optimizer=SGD(model.parameters()),  # without state: whoever trains on starts with a fresh one
        tokenizer=source.tokenizer,
        state=RunState(0, 0, training.max_steps or 0, training.max_epochs or 0),
        hooks={},
        corpus_digest=IMPORTED,
        progress={"left_out": 0, "best": None},
        randoms=(),
        copy=False,
    )
    return write_snapshot(out, snapshot)


@contextmanager
def _emptied(out: Path) -> Iterator[None]:
    """Leave nothing in the run's folder where the source is refused, so that it may be tried again."""
    was_there = out.exists()
    try:
        yield
    except BaseException:
        (out / PROFILE).unlink(missing_ok=True)
        if out.exists() and not was_there:
            out.rmdir()
        raise


def _profile(source: Source, out: Path, form: Format, sets: Sequence[str]) -> Profile:
    """The profile, written to the run and read again, so that it is checked as any other."""
    tokenizer: dict[str, object] = {
        "provider": "pretrained",
        "vocab_size": source.tokenizer.vocab_size,
        "add_bos": source.add_bos,
        "stop_ids": list(source.shape.eos[1:]),
    }
    document = {
        "name": source.name,
        "description": f"Imported from {'a GGUF file' if form == 'gguf' else 'a safetensors folder'}.",
        "model": source.shape.to_profile(),
        "training": {
            "max_epochs": 1,
            "batch_size": 8,
            "learning_rate": 2e-5,
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "gradient_clip": 1.0,
        },
        "data": {"source": "stdlib", "tokenizer": tokenizer},
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / PROFILE).write_text(yaml.dump(cast("dict[str, Value]", document)), encoding="utf-8")
    profile = load_profile(out / PROFILE, sets=sets)
    (out / PROFILE).write_text(yaml.dump(profile.values), encoding="utf-8")
    return profile


def _tied(source: Source, name: str) -> bool:
    """Whether it is a head that the embedding stands for."""
    return source.shape.tied and name == "lm_head.weight"
