"""One JSON Schema for profiles, of exactly what is installed: an editor completes and checks third parties' options too.

Each kind is a definition, ``#/$defs/<kind>``: any of its providers' names, or a mapping with `provider` and the options of that
provider. Options that are providers themselves refer to the definition of their kind. The predecessor's keys are there, marked as
deprecated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from apt.core.config import APTConfig
from apt.core.layout import MODEL, RENAMED, SECTIONS, TOP
from apt.core.legacy import KINDS
from apt.core.provider import SLOT_KEY, Provider
from apt.core.registry import Registry
from apt.core.registry import registry as installed
from apt.core.schedules import Piecewise, Ramp, Segment
from apt.core.sections import Data
from apt.errors import ProviderError

Schema = dict[str, Any]  # JSON
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def profile_schema(registry: Registry | None = None) -> tuple[Schema, list[str]]:
    """The schema, and one line for each provider that is left out because it cannot be loaded.

    Provider classes are imported, PyTorch is not.
    """
    return _Writer(installed if registry is None else registry).write()


class _Writer:
    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.defs: Schema = {}
        self.left_out: list[str] = []
        self.classes: dict[str, dict[str, type[Provider]]] = {}

    def write(self) -> tuple[Schema, list[str]]:
        for kind, names in self.registry.list_providers().items():
            self.classes[kind] = self._load(kind, names)
        for kind in {*self.classes, *KINDS, "router", "tokenizer", "logger"}:
            self.defs.setdefault(kind, self._kind(kind))
        config = self._object(APTConfig)
        properties = config["properties"]
        sections: Schema = {name: self._object(section) for name, section in SECTIONS.items()}
        for old, new in RENAMED.items():
            sections["training"]["properties"][old] = properties[new]
        top = {name: properties[name] for name in TOP if name != "schedules"}
        schema = {
            "$schema": DIALECT,
            "title": "APT profile",
            "type": "object",
            "additionalProperties": False,
            "properties": {
                **top,
                "base": {"type": "string", "description": "another profile to inherit from, seen from this file"},
                "plugins": self._plugins(),
                "model": self._model({name: properties[name] for name in MODEL}),
                "schedules": self._schedules(),
                "data": self._data(),
                **sections,
            },
            "$defs": self.defs,
        }
        return schema, self.left_out

    def _load(self, kind: str, names: Iterable[str]) -> dict[str, type[Provider]]:
        found: dict[str, type[Provider]] = {}
        for name in names:
            try:
                found[name] = self.registry.load(kind, name)
            except ProviderError as error:
                self.left_out.append(f"{kind}.{name}: {error}")
        return found

    def _object(self, model: type[Any]) -> Schema:
        """A pydantic model's schema; its definitions go to the one place where they are all kept."""
        schema: Schema = _referring(model.model_json_schema(ref_template="#/$defs/{model}"))
        self.defs |= schema.pop("$defs", {})
        return schema

    def _options(self, provider: type[Provider]) -> Schema:
        return dict(self._object(provider).get("properties", {}))

    def _kind(self, kind: str) -> Schema:
        """A provider of this kind: its name, or a mapping."""
        classes = self.classes.get(kind, {})
        local = {"type": "string", "pattern": r"\.py:", "description": "a class in a file beside the profile"}
        forms: list[Schema] = [{"enum": list(classes)}, local]
        for name, provider in classes.items():
            required = [key for key, field in provider.model_fields.items() if field.is_required()]
            forms.append(
                {
                    "type": "object",
                    "description": (provider.__doc__ or "").strip().partition("\n")[0],
                    "properties": {"provider": {"const": name}, "fallback": _FALLBACK, **self._options(provider)},
                    "required": ["provider", *required],
                    "additionalProperties": False,
                }
            )
        forms.append({"type": "object", "properties": {"provider": local}, "required": ["provider"]})
        inherited = self._loose(kind, more={"fallback": _FALLBACK})
        inherited["description"] = "further options of the provider that the base names, or of the default"
        return {"anyOf": [*forms, inherited]}

    def _model(self, properties: Schema) -> Schema:
        # null takes an inherited section away, below as in the schedules.
        kinds = {kind: {"anyOf": [{"$ref": f"#/$defs/{kind}"}, {"type": "null"}]} for kind in KINDS}
        names = {
            f"{kind}_name": {"enum": [*self.classes.get(kind, {}), *(["none"] if kind == "retrieval" else [])]}
            for kind in (*KINDS, "router")
        }
        old = {
            **names,
            "tva": self._loose("attention"),
            "bistate": self._loose("align"),
            "moe": self._loose("ffn", "router", more={"enabled": {"type": "boolean"}}),
        }
        return {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                **properties,
                **kinds,
                **{key: {**value, "deprecated": True} for key, value in old.items() if key not in properties},
            },
        }

    def _loose(self, *kinds: str, more: Mapping[str, Schema] | None = None) -> Schema:
        """An old section: the options of every provider of these kinds, whichever is meant."""
        properties: Schema = dict(more or {})
        for kind in kinds:
            for provider in self.classes.get(kind, {}).values():
                for name, schema in self._options(provider).items():
                    known = properties.get(name)
                    if known is None:
                        properties[name] = schema
                    elif known != schema:
                        forms = known.get("anyOf", [known]) if set(known) == {"anyOf"} else [known]
                        properties[name] = {"anyOf": [*forms, schema]}
        return {"type": "object", "properties": properties, "additionalProperties": False}

    def _plugins(self) -> Schema:
        classes = self.classes.get("plugin", {})
        options = {
            name: {"type": "object", "properties": self._options(provider), "additionalProperties": False}
            for name, provider in classes.items()
        }
        with_options = {"type": "object", "properties": options, "additionalProperties": False, "maxProperties": 1}
        return {"type": "array", "items": {"anyOf": [{"enum": list(classes)}, with_options]}}

    def _schedules(self) -> Schema:
        entry = {"anyOf": [self._object(model) for model in (Ramp, Piecewise)]}
        entry["anyOf"] += [{"type": "array", "items": self._object(Segment), "minItems": 1}, {"type": "null"}]
        values = {
            value: f"{kind}.{name}"
            for kind, classes in self.classes.items()
            for name, provider in classes.items()
            for value in provider.scheduled
        }
        properties: Schema = {name: {**entry, "description": f"read by {who}"} for name, who in values.items()}
        for plugin in self.classes.get("plugin", {}):
            for unit in ("epoch", "step"):
                properties[f"enable_{plugin}_at_{unit}"] = {
                    "type": ["integer", "null"],
                    "minimum": 0,
                    "description": f"the {unit} from which on {plugin} is on",
                }
        return {"type": "object", "properties": properties, "additionalProperties": False}

    def _data(self) -> Schema:
        """The source's options stand beside `source`."""
        forms = []
        common = {"tokenizer": {"$ref": "#/$defs/tokenizer"}, "cache": Data.model_json_schema()["properties"]["cache"]}
        for name, provider in self.classes.get("data", {}).items():
            required = [key for key, field in provider.model_fields.items() if field.is_required()]
            default = name == APTConfig.model_fields["data"].get_default().source
            forms.append(
                {
                    "type": "object",
                    "properties": {"source": {"const": name}, **common, **self._options(provider)},
                    "required": required if default else ["source", *required],
                    "additionalProperties": False,
                }
            )
        forms.append(self._loose("data", more=common))  # of the source that the base names
        return {"anyOf": forms}


_FALLBACK: Schema = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    "description": "what may stand in, in order",
}


def _referring(value: Any) -> Any:
    """The schema with nested providers as references to the definition of their kind."""
    if isinstance(value, list):
        return [_referring(each) for each in value]
    if not isinstance(value, dict):
        return value
    rest = {key: _referring(each) for key, each in value.items() if key != SLOT_KEY}
    return {"$ref": f"#/$defs/{value[SLOT_KEY]}", **rest} if SLOT_KEY in value else rest
