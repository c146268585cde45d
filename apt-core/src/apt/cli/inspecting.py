"""Commands that look and change nothing: providers, check, doctor. None of them loads PyTorch."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, get_args

from apt.cli.options import add_profile_options, print_notes, read_profile
from apt.cli.show import count, print_json, print_providers, print_table, size

if TYPE_CHECKING:
    from pydantic import BaseModel

    from apt.cli.running import Commands
    from apt.core.discovery import ProviderRecord
    from apt.core.estimate import Estimate
    from apt.core.profile import Profile
    from apt.core.schedules import Piecewise, Ramp


def add_commands(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the commands of this module."""
    providers = commands.add_parser(
        "providers",
        help="list what is installed; `providers show KIND.NAME` tells one provider's options",
        usage="apt-core providers [-h] [--check] [--json] [KIND]\n       apt-core providers show KIND.NAME [--json]",
        description="List what is installed: kind, name, distribution, version, which is the kind's default, and whether "
        "it is loaded, not loaded yet, disabled or broken. Or show one provider's options, with types and defaults.",
    )
    providers.add_argument(
        "words", nargs="*", metavar="KIND", help="such as attention, ffn, router; none: all (or: show attention.sdpa)"
    )
    providers.add_argument(
        "--check", action="store_true", help="import each provider in a process of its own, to find the broken ones"
    )
    _add_json(providers)
    providers.set_defaults(run=_providers)

    check = commands.add_parser(
        "check",
        help="validate a profile and tell what its model costs, before training",
        description="Validate a profile, with every fault in one report, and tell the model's shape, parameters, FLOPs "
        "per token and memory, and what is switched on when. Nothing is built, and PyTorch is not loaded.",
    )
    add_profile_options(check, positional=True)
    _add_json(check)
    check.set_defaults(run=_check)

    doctor = commands.add_parser(
        "doctor",
        help="try everything that is installed, and name what is wrong",
        description="Import every installed provider in a process of its own, and name what is broken, missing, claimed "
        "twice or made for another apt-core. Exits with 1 where something is.",
    )
    doctor.add_argument(
        "--time-limit", type=float, default=20.0, metavar="SECONDS", help="for each provider's import (default: 20)"
    )
    _add_json(doctor)
    doctor.set_defaults(run=_doctor)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def _providers(arguments: argparse.Namespace) -> int:
    from apt.core.registry import registry
    from apt.errors import UserError, nearest

    words: list[str] = arguments.words
    if words[:1] == ["show"]:
        if len(words) != 2 or "." not in words[1]:
            raise UserError("providers show: give one provider, such as: apt-core providers show attention.sdpa")
        return _show(*words[1].split(".", 1), as_json=arguments.json)
    if len(words) > 1:
        raise UserError(f"providers: {' '.join(words)!r} is not a kind; give one kind, or: show KIND.NAME")
    kind = words[0] if words else None
    records = registry.records(kind)
    if not records:
        known = sorted({record.kind for record in registry.records()})
        raise UserError(
            " ".join(
                filter(
                    None,
                    (
                        f"no provider of kind {kind!r} is installed;",
                        nearest(str(kind), known),
                        f"kinds: {', '.join(known)}",
                    ),
                )
            )
        )
    broken = _probe() if arguments.check else {}
    claims: dict[str, int] = {}
    for record in records:
        claims[record.key] = claims.get(record.key, 0) + (not record.disabled)
    if arguments.json:
        print_json(
            {
                "kind": record.kind,
                "name": record.name,
                "distribution": record.distribution,
                "version": record.version,
                "entry_point": record.entry_point,
                "path": record.path,
                "default": registry.get_default(record.kind) == record.name,
                "state": _state(record, claims[record.key], broken),
            }
            for record in records
        )
        return 0
    print_table(
        ("KIND", "NAME", "DISTRIBUTION", "VERSION", "DEFAULT", "STATE"),
        (
            (
                record.kind,
                record.name,
                record.distribution,
                record.version,
                "default" if registry.get_default(record.kind) == record.name else "",
                _state(record, claims[record.key], broken),
            )
            for record in records
        ),
    )
    for fault in registry.faults():
        print(f"warning: {fault}", file=sys.stderr)
    if not arguments.check:
        print(
            "\nNothing was imported for this list; --check tries each import, `apt-core doctor` says all that it finds."
        )
    return 0


def _state(record: ProviderRecord, claims: int, broken: dict[str, str]) -> str:
    """What is known of one claim, in words."""
    from apt.core.loading import check_distribution
    from apt.core.registry import registry
    from apt.errors import ProviderError

    if record.disabled:
        return f"disabled: {record.disabled}"
    if claims > 1:
        return "broken: its name is claimed by more than one distribution"
    try:
        check_distribution(record)
    except ProviderError as error:
        return f"broken: {str(error).removeprefix(f'{record} ')}"
    if record.key in broken:
        return f"broken: {broken[record.key]}"
    return "loaded" if registry.get_info(record.kind, record.name)["loaded"] else "not loaded"


def _probe() -> dict[str, str]:
    """What is wrong with each provider that cannot be imported."""
    from apt.core.doctor import diagnose

    return {found.subject: found.what for found in diagnose().findings if found.level == "fault"}


def _show(kind: str, name: str, *, as_json: bool) -> int:
    from apt.core.registry import registry

    provider = registry.load(kind, name)
    info = registry.get_info(kind, name)
    description, options = _paragraph(provider.__doc__ or ""), describe_options(provider)
    facts = {
        "scheduled values": [*provider.scheduled],
        "switched by the plugin": [provider.switched_by] if provider.switched_by else [],
        "excludes": [*info["excludes"]],  # type: ignore[misc]
        "capabilities": sorted(provider.capabilities),
        "requires": provider.get_dependencies(),
    }
    if as_json:
        columns = ("option", "type", "default", "what")
        print_json(
            {
                **{key: info[key] for key in ("kind", "name", "distribution", "version", "entry_point")},
                "description": description,
                "options": [dict(zip(columns, row, strict=True)) for row in options],
                **{title.replace(" ", "_"): words for title, words in facts.items()},
            }
        )
        return 0
    print(f"{kind}.{name}  ({info['distribution']} {info['version']}, {info['entry_point']})\n")
    print(description)
    print("\noptions:")
    if options:
        print_table(("  OPTION", "TYPE", "DEFAULT", "WHAT"), [(f"  {option}", *words) for option, *words in options])
    else:
        print("  none")
    for title, words in facts.items():
        if words:
            print(f"{title}: {', '.join(words)}")
    return 0


def _paragraph(text: str) -> str:
    import inspect

    return inspect.cleandoc(text)


def describe_options(model: type[BaseModel]) -> list[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each option; what a mapping may hold follows it, as ``option.inner``."""
    from pydantic.errors import PydanticInvalidForJsonSchema

    from apt.errors import AptError

    rows: list[tuple[str, str, str, str]] = []
    try:
        properties = model.model_json_schema()["properties"] if model.model_fields else {}
    except PydanticInvalidForJsonSchema as error:
        raise AptError(f"{model.__qualname__}: its options cannot be described: {error.message}") from error
    for option, schema in properties.items():
        what = str(schema.get("description", ""))
        rows.append((option, describe_type(schema), describe_default(model, option), what))
        for inner in _mappings(model.model_fields[option].annotation):
            rows += [(f"{option}.{row[0]}", *row[1:]) for row in describe_options(inner)]
    return rows


def _mappings(annotation: object) -> list[type[BaseModel]]:
    """The closed mappings among the members of a type."""
    from pydantic import BaseModel

    from apt.core.provider import Provider

    members = get_args(annotation) or (annotation,)
    closed = [each for each in members if isinstance(each, type) and issubclass(each, BaseModel)]
    return [each for each in closed if not issubclass(each, Provider)]


def describe_type(schema: dict[str, object]) -> str:
    """A field's type in words, with its range."""
    from apt.core.provider import SLOT_KEY

    if "anyOf" in schema:
        return " or ".join(describe_type(each) for each in schema["anyOf"])  # type: ignore[attr-defined]
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))  # type: ignore[call-overload]
    if "const" in schema:
        return str(schema["const"])
    if "$ref" in schema:
        return "mapping"
    if SLOT_KEY in schema:
        return f"{schema[SLOT_KEY]} provider"
    names = {"null": "none", "boolean": "true or false", "array": "list", "object": "mapping", "string": "text"}
    kind = str(schema.get("type", "any"))
    bounds = [
        f"{sign} {schema[key]:g}"
        for key, sign in (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
        if key in schema
    ]
    return " ".join((names.get(kind, kind), ", ".join(bounds))).rstrip()


def describe_default(model: type[BaseModel], option: str) -> str:
    """An option's default in words."""
    field = model.model_fields[option]
    if field.is_required():
        return "must be given"
    value = field.get_default(call_default_factory=True, validated_data={})
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _check(arguments: argparse.Namespace) -> int:
    from apt.core.estimate import estimate

    profile = read_profile(arguments)
    print_notes(profile)
    config, resolved = profile.config, profile.resolved
    assert resolved is not None
    cost = estimate(config, resolved)
    if arguments.json:
        sums = ("parameters", "active_parameters", "flops_per_token", "training_memory")
        print_json(
            {
                "profile": str(arguments.profile),
                "name": config.name,
                "cost": asdict(cost) | {each: getattr(cost, each) for each in sums},
                "providers": [each.to_dict() for each in resolved.resolutions],
                "notes": list(profile.notes),
            }
        )
        return 0
    print(f"{arguments.profile}: good\n")
    print(
        f"{config.name}: {config.architecture}, {config.num_blocks} layers, d_model {config.d_model}, {config.num_heads} heads, "
        f"d_ff {config.d_ff}, context {config.max_seq_len}, vocabulary {config.vocab_size}\n"
    )
    print_table(
        ("PART", "PROVIDER", "LAYERS", "PARAMETERS", "ACTIVE", "FLOPS/TOKEN"),
        [
            *(
                (
                    each.part,
                    each.provider,
                    str(each.count),
                    *map(count, (each.parameters, each.active, each.flops_per_token)),
                )
                for each in cost.parts
            ),
            ("total", "", "", count(cost.parameters), count(cost.active_parameters), count(cost.flops_per_token)),
        ],
        right=("LAYERS", "PARAMETERS", "ACTIVE", "FLOPS/TOKEN"),
    )
    times = "four times as many, since it computes activations anew" if cost.recomputed else "three times as many"
    print(f"\nACTIVE is what one token meets; FLOPs are of a forward pass at full context, training takes {times}.")
    if "align" in resolved.providers:
        print(_align_cost(cost))
    batch = config.training.batch_size
    averages = f"averaged weights {size(cost.averages)}, " if cost.averages else ""
    averages += f"the model's own while those teach {size(cost.set_aside)}, " if cost.set_aside else ""
    on_cpu = f"; {size(cost.dropped_scores)} more on a CPU, for attention_dropout" if cost.dropped_scores else ""
    print(
        f"\nmemory of training, batches of {batch} x {config.max_seq_len}: {size(cost.training_memory)} "
        f"(weights {size(cost.weights)}, gradients {size(cost.gradients)}, optimizer {size(cost.optimizer)}, "
        f"{averages}activations {size(cost.activations)}){on_cpu}\nKV cache: {size(cost.cache_per_token)} a token\n"
    )
    _print_plan(profile)
    print_providers(resolved.resolutions)
    return 0


def _align_cost(cost: Estimate) -> str:
    """What alignment costs, in words."""
    forward, backward = cost.extra_passes
    if not forward:
        return "align needs no further pass of the model; what it computes beside, such as a search for evidence, is not counted."
    multiple = "doubles the forward pass" if forward == 1 else f"makes {forward + 1} forward passes of one"
    if backward:
        multiple += " and the backward pass" + ("es" if backward > 1 else "")
    training, aligned = cost.training_flops
    return (
        f"align {multiple}: {count(aligned)} FLOPs a token of training while its weight is above 0, "
        f"{count(training)} without it."
    )


def _print_plan(profile: Profile) -> None:
    """When each plugin is switched on, and where each scheduled value goes."""
    from apt.core.schedules import Schedule, list_unfinished, run_length

    schedule = Schedule(profile.config)
    for plugin in profile.config.plugins:
        unit, start = schedule.switches.get(plugin, ("epoch", 0))
        print(f"{plugin}: on from {unit} {start}" if start else f"{plugin}: on from the start")
    for name, entry in schedule.params.items():
        print(f"{name}: {_course(entry)}")
    training = profile.config.training
    unreached = schedule.list_unreached(training.max_steps, training.steps_per_epoch, training.max_epochs)
    steps = training.max_steps
    if training.steps_per_epoch is not None:
        steps, _ = run_length(training, training.steps_per_epoch)
    for line in (*unreached, *list_unfinished(profile.config, steps)):
        print(f"warning: {line}", file=sys.stderr)
    if profile.config.plugins or schedule.params:
        print()


def _course(entry: Ramp | Piecewise) -> str:
    """A scheduled value's way, in words."""
    from apt.core.schedules import Ramp

    if isinstance(entry, Ramp):
        rest = "".join(
            f", {units} {entry.by}s of {name}"
            for name, units in (("warmup", entry.warmup), ("cooldown", entry.cooldown))
            if units
        )
        return f"{entry.start:g} -> {entry.end:g} by {entry.by}, {entry.type}{rest}"
    pieces = (
        f"{each.start:g} -> {each.end:g} until {entry.by} {'the last' if each.until is None else each.until}, {each.type}"
        for each in entry.segments
    )
    return "; ".join(pieces)


def _doctor(arguments: argparse.Namespace) -> int:
    from apt.cli import build_parser, own_commands
    from apt.core.doctor import diagnose

    print("trying each package in a process of its own ...", file=sys.stderr, flush=True)
    diagnosis = diagnose(time_limit=arguments.time_limit)
    own = {f"command.{name}" for name in own_commands(build_parser())}
    taken = "apt-core has a command of this name, so this one cannot be called; give it another name"
    findings = [
        replace(found, level="fault", what=taken) if found.subject in own else found for found in diagnosis.findings
    ]
    diagnosis = replace(diagnosis, findings=tuple(findings))
    if arguments.json:
        print_json({**asdict(diagnosis), "healthy": diagnosis.healthy})
        return 0 if diagnosis.healthy else 1
    print("\n".join(f"{name}: {value}" for name, value in diagnosis.environment.items()) + "\n")
    colours = {"ok": "ok", "warning": "warning", "fault": "FAULT"}
    print_table(
        ("SUBJECT", "DISTRIBUTION", "", ""),
        ((found.subject, found.distribution, colours[found.level], found.what) for found in diagnosis.findings),
    )
    faults = sum(found.level == "fault" for found in diagnosis.findings)
    print(
        "\neverything is in order"
        if diagnosis.healthy
        else f"\n{faults} faults; what they name cannot be used, the rest can"
    )
    for variable in ("APT_DISABLE_PLUGINS", "APT_ONLY_PLUGINS"):
        if variable in os.environ:
            print(f"{variable}={os.environ[variable]}")
    return 0 if diagnosis.healthy else 1


__all__ = ["add_commands"]
