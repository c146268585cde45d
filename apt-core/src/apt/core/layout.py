"""Where the fields of `APTConfig` stand in a profile, and of which type a value at a dotted path is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic.fields import FieldInfo

from apt.core.config import APTConfig, Data, Debug, Evaluation, Hardware, Monitoring, Section, Training
from apt.core.legacy import KINDS
from apt.core.provider import Provider
from apt.core.registry import Registry
from apt.core.schedules import SWITCH, Ramp
from apt.errors import ProviderError

RENAMED = {
    "learning_rate": "base_lr",
    "warmup_steps": "warmup_steps",
    "weight_decay": "weight_decay",
    "gradient_clip": "gradient_clip",
}
"""Keys of `training` that are fields of `APTConfig` itself."""
SECTIONS: dict[str, type[Section]] = {
    "training": Training,
    "evaluation": Evaluation,
    "monitoring": Monitoring,
    "hardware": Hardware,
    "debug": Debug,
}
TOP = ("name", "version", "description", "schedules", "extra")
_NOT_OF_THE_MODEL = {*TOP, *SECTIONS, *RENAMED.values(), "plugins", "data", "options", "fallback"}
MODEL = tuple(
    name
    for name in APTConfig.model_fields
    if name not in _NOT_OF_THE_MODEL and name not in {f"{kind}_name" for kind in KINDS}
)
"""Keys of `model` that are fields of `APTConfig`."""


def document_path(loc: Sequence[int | str]) -> str:
    """Where a field of `APTConfig` stands in a profile."""
    first, *rest = (str(part) for part in loc)
    backwards = {new: f"training.{old}" for old, new in RENAMED.items()}
    if first in backwards:
        first = backwards[first]
    elif first in MODEL:
        first = f"model.{first}"
    elif first.endswith("_name"):
        first = f"model.{first.removesuffix('_name')}.provider"
    elif first in ("options", "fallback"):
        first = "model"
    return ".".join((first, *rest))


def type_at(path: Sequence[str], values: Mapping[str, object], registry: Registry) -> object:
    """The annotation of the value at a path of a profile that holds `values` so far; None where nobody knows it."""
    section, *rest = path
    fields = APTConfig.model_fields
    inner = values.get(section)
    given = inner if isinstance(inner, Mapping) else {}
    if not rest:
        return _annotation(fields.get(section))
    key, *further = rest
    if section == "schedules":
        if SWITCH.fullmatch(key):
            return int
        return _annotation(Ramp.model_fields.get(further[0])) if len(further) == 1 else None
    if section == "model" and key in KINDS:
        return _in_provider(key, given.get(key), fields[f"{key}_name"].get_default(), further, registry)
    if section == "data":
        if key == "tokenizer":
            default = fields["data"].get_default().tokenizer.provider
            return _in_provider("tokenizer", given.get(key), default, further, registry)
        if key in Data.model_fields and key != "source":
            return _annotation(Data.model_fields[key])
        source = given.get("source", fields["data"].get_default().source)
        return str if key == "source" else _in_provider("data", source, "", rest, registry)
    if further:
        return None
    if section == "model" or (section == "training" and key in RENAMED):
        return _annotation(fields.get(RENAMED.get(key, key)))
    return _annotation(SECTIONS[section].model_fields.get(key)) if section in SECTIONS else None


def _annotation(field: FieldInfo | None) -> object:
    return None if field is None else field.annotation


def _in_provider(kind: str, given: object, default: str, path: Sequence[str], registry: Registry) -> object:
    """The annotation of a provider's option, at any depth of nested providers."""
    named = given.get("provider", default) if isinstance(given, Mapping) else given
    name = named if isinstance(named, str) else default
    if not path:
        return None
    key, *rest = path
    if key in ("provider", "fallback"):
        return str if key == "provider" else list
    try:
        field = registry.load(kind, name).model_fields.get(key)
    except ProviderError:  # told when the profile is resolved
        return None
    annotation = _annotation(field)
    if field is not None and isinstance(annotation, type) and issubclass(annotation, Provider):
        inner = given.get(key) if isinstance(given, Mapping) else None
        held = field.get_default(call_default_factory=True, validated_data={})
        return _in_provider(annotation.kind, inner, held if isinstance(held, str) else "", rest, registry)
    return None if rest else annotation
