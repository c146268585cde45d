"""Commands about profiles: schema, profile new|show|diff, schedule plot. None of them loads PyTorch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from apt.cli.options import add_profile_options, print_notes, read_profile

if TYPE_CHECKING:
    from apt.cli.running import Commands
    from apt.core.profile import Profile

NEW = """\
# yaml-language-server: $schema=profile.schema.json
# The first line is for editors: `apt-core schema > profile.schema.json` writes that file, for what is installed here.
name: {name}
description: one sentence that tells this run from the others
plugins: []                      # such as [moe, align]: `apt-core providers plugin` lists what there is
model:
  d_model: 128                   # width of the hidden states
  num_heads: 4
  num_layers: 4
  d_ff: 512                      # hidden width of the feed-forward network
  max_seq_len: 128
  dropout: 0.0
  attention_dropout: 0.0
  attention: {{provider: sdpa}}    # `apt-core providers show attention.sdpa` tells its options
  ffn: {{provider: default}}
training:
  max_epochs: 5
  steps_per_epoch: 200
  batch_size: 16
  learning_rate: 3e-3
  warmup_steps: 50
schedules: {{}}                    # such as enable_moe_at_epoch: 2
data: {{source: stdlib}}           # or {{source: files, path: "texts/*.txt"}}
evaluation: {{max_batches: 100, sample_prompt: "def "}}
"""


def add_commands(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the commands of this module."""
    schema = commands.add_parser("schema", help="print the JSON Schema of profiles, for exactly what is installed")
    schema.set_defaults(run=_schema)

    profile = commands.add_parser("profile", help="make, show and compare profiles")
    verbs = profile.add_subparsers(dest="verb", metavar="new|show|diff", required=True)
    new = verbs.add_parser("new", help="write a profile to start from")
    new.add_argument("file", type=Path, metavar="FILE", help="must not exist yet")
    new.set_defaults(run=_new)
    show = verbs.add_parser("show", help="print the resolved profile, with the origin of each value")
    add_profile_options(show, positional=True)
    show.set_defaults(run=_show)
    diff = verbs.add_parser("diff", help="print where two profiles differ once resolved; exit 0 either way")
    diff.add_argument("first", type=Path, metavar="FILE")
    diff.add_argument("second", type=Path, metavar="FILE")
    diff.add_argument("--allow-local-code", action="store_true", help="run provider code that lies in other folders")
    diff.set_defaults(run=_diff)

    schedule = commands.add_parser("schedule", help="look at a profile's schedules before any training")
    verbs = schedule.add_subparsers(dest="verb", metavar="plot", required=True)
    plot = verbs.add_parser("plot", help="draw every scheduled value and switch over the run")
    add_profile_options(plot, positional=True)
    plot.add_argument("--out", type=Path, metavar="FILE", help="a .png or .svg file (default: draw in the terminal)")
    plot.set_defaults(run=_plot)


def _schema(arguments: argparse.Namespace) -> int:
    from apt.core.schema import profile_schema

    schema, left_out = profile_schema()
    print(json.dumps(schema, indent=2))
    for line in left_out:
        print(f"warning: left out of the schema: {line}", file=sys.stderr)
    return 0


def _new(arguments: argparse.Namespace) -> int:
    path: Path = arguments.file
    with path.open("x") as file:
        file.write(NEW.format(name=path.stem))
    print(f"{path}: written; next: apt-core check {path}, then apt-core train -p {path}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from apt.core import yaml

    profile = read_profile(arguments)
    print_notes(profile)
    text = yaml.dump(_complete(profile))
    source = yaml.read_text(text, "")
    lines = text.splitlines()
    width = min(60, max(map(len, lines)))
    said: dict[int, str] = {}
    for path, _ in _leaves(source.values):
        origin = source.origins[tuple(path)]
        said[origin.line - 1] = profile.origin(".".join(map(str, path)))
    for number, line in enumerate(lines):
        print(f"{line:<{width}}  # {said[number]}" if number in said else line)
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from apt.core.profile import load_profile

    profiles = [
        load_profile(path, allow_local_code=arguments.allow_local_code) for path in (arguments.first, arguments.second)
    ]
    sides = [{".".join(map(str, path)): value for path, value in _leaves(_complete(each))} for each in profiles]
    absent = object()
    paths = [path for path in {**sides[0], **sides[1]} if sides[0].get(path, absent) != sides[1].get(path, absent)]
    for path in paths:
        print(f"{path}:")
        for mark, side, profile in zip("-+", sides, profiles, strict=True):
            if path in side:
                print(f"  {mark} {json.dumps(side[path])}  ({profile.origin(path)})")
    print(f"{len(paths)} values differ" if paths else "the same once resolved")
    return 0


def _plot(arguments: argparse.Namespace) -> int:
    from apt.core.schedule_plot import plot_schedules

    profile = read_profile(arguments)
    print_notes(profile)
    print(plot_schedules(profile.config, _steps_per_epoch(profile), arguments.out))
    return 0


def _steps_per_epoch(profile: Profile) -> int:
    """As the profile says; where it leaves that to the text, the text is read."""
    from rich.console import Console

    from apt.data.batches import make_batches
    from apt.data.corpus import steps_per_epoch
    from apt.data.prepare import prepare

    config, resolved = profile.config, profile.resolved
    if config.training.steps_per_epoch is not None:
        return config.training.steps_per_epoch
    assert resolved is not None
    print("reading the text, which says how many steps an epoch has ...", file=sys.stderr, flush=True)
    train = prepare(config, resolved, Console(stderr=True)).splits["train"]
    return steps_per_epoch(config, make_batches(train, config).batches_per_pass)


def _complete(profile: Profile) -> dict[str, object]:
    """The profile in canonical form with every value, providers' defaults too."""
    from apt.core.profile import to_profile

    assert profile.resolved is not None
    values: dict[str, object] = dict(to_profile(profile.config))
    for resolution in profile.resolved.resolutions:
        holder, *path = resolution.where.split(".")
        if holder in ("plugins", "monitoring"):
            continue
        inner = values[holder]
        for key in path:
            assert isinstance(inner, dict)
            slot = inner.get(key)
            inner[key] = dict(slot) if isinstance(slot, Mapping) else {"provider": slot}
            inner = inner[key]
        assert isinstance(inner, dict)
        if holder != "data" or path:
            inner["provider"] = resolution.used
        for name, value in resolution.provider.model_dump(mode="json").items():
            inner[name] = value
    return values


def _leaves(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], object]]:
    """Every value that holds no others, with its path; a list is one value."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    else:
        yield path, value
