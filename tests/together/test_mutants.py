"""Mutated profiles of everything together: what is wrong is refused in words, what is accepted fits the JSON Schema too.

Each mutation is drawn by a seeded generator, so that a number is enough to see it again. The schema is the second judge: it is
made for editors, and does not share the code that reads profiles.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from apt.core import yaml
from apt.core.profile import load_profile
from apt.core.schema import profile_schema
from apt.errors import ProfileError

PROFILES = Path(__file__).parents[2] / "profiles"
NESTED = """
name: nested
plugins: [moe, align, {rag: {top_k: 2, retriever: {provider: cosine, top_k: 4}}}]
model:
  d_model: 64
  num_heads: 4
  num_layers: 2
  d_ff: 64
  dropout: 0.1
  tie_embeddings: true
  norm: rmsnorm
  attention: {provider: tva_default, r: 2}
  ffn:
    provider: moe
    experts: 8
    capacity: 1.5
    layers: {every: 1}
    expert: {provider: swiglu}
    router: {provider: topk_default, top_k: 2, balance_loss: 0.01, renormalise: true}
  align: {provider: bistate_default, state: layer, weight: 0.5}
  retrieval: {provider: cosine, overlap: 10}
training: {max_epochs: 3, steps_per_epoch: 5, batch_size: 4, save_every: 10 min, betas: [0.9, 0.95], learning_rate: 3e-3,
  warmup_steps: 2, seed: 3, compile: false, precision: bf16, min_lr_ratio: 0.2, keep_last: 2}
schedules:
  enable_moe_at_epoch: 1
  enable_align_at_step: 3
  route_temp: {start: 1.5, end: 0.8, by: epoch}
  moe_capacity: [{until: 1, start: 1.5, end: 1.1}, {start: 1.1, end: 1.0, type: cosine}]
  align_weight: {start: 0.0, end: 0.1, by: step, warmup: 1, cooldown: 2}
data: {source: files, path: x.txt, tokenizer: {provider: byte}}
evaluation: {max_batches: 4, sample_prompt: x, sample_tokens: 20, eval_every: 3, samples: false}
monitoring: {log_every: 1, spike: 3.0, plot: true}
hardware: {device: cpu, threads: 1, matmul: strict}
debug: {detect_anomaly: false}
"""
TEXT = {
    ("name",),
    ("version",),
    ("description",),
    ("data", "path"),
    ("data", "pattern"),
    ("evaluation", "sample_prompt"),
}
"""Where any text is right."""
NO_NUMBER = (
    ".nan",
    ".inf",
    "-.inf",
    "nan",
    "Infinity",
    "1e400",
    "9" * 30,
    "'3'",
    '"4"',
    "2026-11-25",
    "12:30:45",
    "1_000",
)
NO_NUMBER += ("no", "yes", "on", "true", "0b1", "1e", "--1", "${APT_TEST_WORD:-three}", "x", "[]", "{}", "'1e3'")
NO_SWITCH = ("yes", "no", "on", "off", "0", "1", "'true'", "tRUE", "0.0", "[true]")
TRAPS = (
    *NO_NUMBER,
    *NO_SWITCH,
    "~",
    "''",
    "0o7",
    "0x1F",
    "1e3",
    "-0",
    "0.5",
    "-1",
    "0",
    "1000000000",
    "none",
    "sdpa",
    "[[]]",
)
TRAPS += (
    "{provider: moe}",
    "{provider: [a]}",
    "{provider: sdpa, fallback: 3}",
    "./x.py:Y",
    "!!int 3",
    "&a 3",
    "*a",
    "\u202e",
)
FOREIGN = {
    "attention": "topk_default",
    "ffn": "tva_default",
    "router": "swiglu",
    "expert": "topk_default",
    "align": "cosine",
}
FOREIGN |= {"retrieval": "bistate_default", "retriever": "byte", "tokenizer": "stdlib", "source": "byte"}
BEYOND: dict[str, tuple[object, ...]] = {
    "d_model": (0, -4, 66, 4.5),
    "num_heads": (0, 7),
    "num_layers": (0, -1, 10**9),
    "layers": ([2], [0, 0], [-1], {"every": 0}, "some", []),
    "d_ff": (0,),
    "dropout": (1.0, -0.1, 1.5),
    "r": (0, -1),
    "experts": (1, 0, -8),
    "capacity": (0, -1.5),
    "every": (0, 99),
    "top_k": (0, -2),
    "weight": (-0.5,),
    "overlap": (-1, 800),
    "max_epochs": (0, -3),
    "batch_size": (0,),
    "betas": ([0.9], [0.9, 1.0], [-0.1, 0.9], [0.9, 0.9, 0.9]),
    "learning_rate": (0, -1e-3),
    "warmup_steps": (-1, 2.5),
    "seed": (-1, 2**32),
    "min_lr_ratio": (-0.1, 1.1),
    "keep_last": (0,),
    "save_every": (0, "10 hours", "min"),
    "enable_moe_at_epoch": (-1, 1.5, "2"),
    "start": (-1.0,),
    "end": (-0.1,),
    "warmup": (-1, 0.5),
    "cooldown": (-2,),
    "by": ("token",),
    "type": ("cosin",),
    "until": (0, 1.5),
    "log_every": (0,),
    "spike": (0, -1),
    "threads": (0, 10**9),
    "device": ("gpu",),
    "precision": ("fp16",),
    "norm": ("rms",),
    "state": ("layers",),
}
"""Values just beyond what a key may have, by its name."""


class Raw(str):
    """YAML as it stands."""


def written(value: object) -> str:
    """Flow YAML in which raw values stand as they are."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {written(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    return json.dumps(value)


@cache
def originals() -> dict[str, dict[str, Any]]:
    texts = {path.name: path.read_text() for path in sorted(PROFILES.glob("*.yaml"))}
    return {name: yaml.read_text(text, name).values for name, text in {**texts, "nested.yaml": NESTED}.items()}  # type: ignore[misc]


@cache
def judge() -> Any:
    return jsonschema.Draft202012Validator(profile_schema()[0])


def places(value: object, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a document."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*above, key)
        yield from places(inner, (*above, key))


def at(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


Mutation = Callable[[random.Random, dict[str, Any]], bool]
"""Changes a document in place; whether it found something to change."""


def chosen(draw: random.Random, document: dict[str, Any], suits: Callable[[tuple[Any, ...], Any], bool]) -> Any:
    """A mapping or list of the document and a key in it whose path and value suit; None where there is none."""
    found = [path for path in places(document) if suits(path, at(document, path))]
    if not found:
        return None
    path = draw.choice(found)
    return at(document, path[:-1]), path[-1], path


def misspelt(draw: random.Random, document: dict[str, Any]) -> bool:
    """A key, nested providers' options among them."""
    place = chosen(draw, document, lambda path, _: isinstance(path[-1], str))
    if place is None:
        return False
    holder, key, _ = place
    where = draw.randrange(len(key) + 1)
    holder[f"{key[:where]}zq{key[where:]}"] = holder.pop(key)
    return True


def foreign(draw: random.Random, document: dict[str, Any]) -> bool:
    """A provider of another kind in a place for providers."""
    place = chosen(draw, document, lambda path, _: path[-1] in FOREIGN and path[0] in ("model", "data", "plugins"))
    if place is None:
        return False
    holder, key, _ = place
    whole = draw.random() < 0.5 or key == "source"
    holder[key] = FOREIGN[key] if whole else {"provider": FOREIGN[key]}
    return True


def reshaped(draw: random.Random, document: dict[str, Any]) -> bool:
    """A list where a mapping belongs, a mapping where a list does, either where a single value does."""

    def suits(path: tuple[Any, ...], value: Any) -> bool:
        return path not in ({("plugins",), ("data", "path")}) and path[:1] != ("schedules",) and path[-1] != "layers"

    place = chosen(draw, document, suits)
    if place is None:
        return False
    holder, key, _ = place
    value = holder[key]
    if isinstance(value, list):
        holder[key] = {str(index): each for index, each in enumerate(value)}
    else:
        holder[key] = (
            draw.choice(([value], [[value]])) if isinstance(value, dict) else draw.choice(([value], {"a": value}))
        )
    return True


def mistyped(draw: random.Random, document: dict[str, Any]) -> bool:
    """What YAML readers take for something else, where a number or a yes or no belongs."""
    place = chosen(draw, document, lambda path, value: isinstance(value, bool | int | float))
    if place is None:
        return False
    holder, key, _ = place
    holder[key] = Raw(draw.choice(NO_SWITCH if isinstance(holder[key], bool) else NO_NUMBER))
    return True


def beyond(draw: random.Random, document: dict[str, Any]) -> bool:
    """A value just out of range."""
    place = chosen(draw, document, lambda path, _: path[-1] in BEYOND)
    if place is None:
        return False
    holder, key, _ = place
    holder[key] = draw.choice(BEYOND[key])
    return True


def doubled(draw: random.Random, document: dict[str, Any]) -> bool:
    """A key that stands twice, the same or not."""
    holder, key, _ = chosen(draw, document, lambda path, _: isinstance(path[-1], str))
    holder[Raw(f'"{key}"')] = copy.deepcopy(holder[key]) if draw.random() < 0.5 else 1
    return True


def swapped(draw: random.Random, document: dict[str, Any]) -> bool:
    """Two sections that took each other's place."""
    sections = [key for key in document if isinstance(document[key], dict) and document[key] and key != "schedules"]
    if len(sections) < 2:
        return False
    one, other = draw.sample(sections, 2)
    document[one], document[other] = document[other], document[one]
    return True


def unknown_schedule(draw: random.Random, document: dict[str, Any]) -> bool:
    """A schedule of what nothing reads, or of a plugin that is not listed."""
    ramp = {"start": 1.0, "end": 0.5}
    name = draw.choice(
        ("route_tmp", "moe_capcity", "dropout", "model.dropout", "learning_rate", "align", "temperature")
    )
    switch = draw.choice(("enable_mo_at_epoch", "enable_voter_at_step", "enable_moe_at_epochs", "enable__at_step"))
    schedules = document.setdefault("schedules", {})
    if not isinstance(schedules, dict):
        return False  # an earlier mutation took them
    schedules[switch if draw.random() < 0.4 else name] = 1 if draw.random() < 0.2 else ramp
    return True


WRONG: tuple[Mutation, ...] = (misspelt, foreign, reshaped, mistyped, beyond, doubled, swapped, unknown_schedule)


def trap(draw: random.Random, document: dict[str, Any]) -> bool:
    """Anything, anywhere."""
    holder, key, _ = chosen(draw, document, lambda path, _: True)
    holder[key] = Raw(draw.choice(TRAPS))
    return True


def moved(draw: random.Random, document: dict[str, Any]) -> bool:
    """Something at another place, or at two."""
    holder, key, path = chosen(draw, document, lambda path, _: True)
    value = copy.deepcopy(holder[key])
    if draw.random() < 0.5:
        holder.pop(key)
    target = chosen(draw, document, lambda path, value: isinstance(value, dict))
    (document if target is None else target[0][target[1]])[str(path[-1])] = value
    return True


def exchanged(draw: random.Random, document: dict[str, Any]) -> bool:
    """Two values that took each other's place."""
    one, other = (chosen(draw, document, lambda _, value: not isinstance(value, dict | list)) for _ in range(2))
    if one is None or other is None:
        return False
    one[0][one[1]], other[0][other[1]] = other[0][other[1]], one[0][one[1]]
    return True


def damaged(draw: random.Random, text: str) -> bytes:
    """Some bytes that are others."""
    content = bytearray(text.encode())
    for _ in range(draw.choice((1, 2, 5))):
        content[draw.randrange(len(content))] = draw.choice(b"{}[]:,'\"#&*!|>%@`- \n\t0a~?\x00\xff")
    return bytes(content)


def accepted(path: Path, content: bytes) -> bool:
    """Whether it is read as a profile; what is refused is refused in lines that say where."""
    path.write_bytes(content)
    try:
        load_profile(path)
    except ProfileError as error:
        refusal = error
    else:
        return True
    assert refusal.faults
    assert all(fault.where and fault.what for fault in refusal.faults)
    assert all(len(line) < 6_000 for line in str(refusal).splitlines())
    return False


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mutants")
    for original in PROFILES.glob("*.yaml"):
        (folder / original.name).write_text(original.read_text())
    return folder / "mutant.yaml"


def drawn(draw: random.Random) -> dict[str, Any]:
    return copy.deepcopy(draw.choice(list(originals().values())))


def check_wrong(path: Path, mutation: Mutation, seed: int) -> None:
    """A mutation that is wrong for certain is refused."""
    draw = random.Random(f"{mutation.__name__} {seed}")
    document = drawn(draw)
    while not mutation(draw, document):
        document = drawn(draw)
    assert not accepted(path, written(document).encode()), (seed, written(document))


def check_any(path: Path, seed: int) -> None:
    """Any mutation at all is refused, or fits the schema."""
    draw = random.Random(seed)
    document = drawn(draw)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        draw.choice((trap, trap, moved, exchanged, *WRONG))(draw, document)
    content = written(document).encode()
    if draw.random() < 0.1:
        content = damaged(draw, draw.choice((NESTED, written(document))))
    if accepted(path, content):
        errors = [error.message for error in judge().iter_errors(yaml.read_file(path).values)]
        assert not errors, (seed, content, errors)


@pytest.mark.parametrize("mutation", WRONG, ids=lambda each: each.__name__)
def test_what_is_wrong_for_certain_is_refused(path: Path, mutation: Mutation) -> None:
    for seed in range(30):
        check_wrong(path, mutation, seed)


def test_what_is_mutated_is_good(path: Path) -> None:
    for document in originals().values():
        assert accepted(path, written(document).encode())


def test_whatever_is_accepted_fits_the_schema_too(path: Path) -> None:
    for seed in range(200):
        check_any(path, seed)


@pytest.mark.thorough
@pytest.mark.parametrize("portion", range(10))
def test_ten_thousand_more(path: Path, portion: int) -> None:
    for seed in range(1_000 + 500 * portion, 1_500 + 500 * portion):
        check_any(path, seed)
        check_wrong(path, WRONG[seed % len(WRONG)], seed)
