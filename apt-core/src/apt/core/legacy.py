"""The predecessor's profiles, translated here and in `legacy_run` into the form that the rest of APT reads.

Old: ``attention_name: tva_default`` and ``tva: {r: 4}``. New: ``attention: {provider: tva_default, r: 4}``. Every value keeps
its place in the file, so that a fault in an old profile is reported where it stands.
"""

from __future__ import annotations

from apt.core.config import OF_AUTOPOIETIC, PREDECESSOR
from apt.core.legacy_run import translate_sections
from apt.core.yaml import Key, Origin, Source, Value
from apt.errors import Fault

KINDS = ("attention", "ffn", "align", "retrieval")
SECTIONS = {"tva": "attention", "bistate": "align"}
_TO_ROUTER = ("top_k", "balance_loss")
_ENABLED, _OLD_MOE = "moe.enabled", "moe"
"""What `translate` leaves in `ffn` of ``model.moe``, for `settle`; no option of a provider is called so."""


def translate(source: Source) -> tuple[Source, list[str], list[Fault]]:
    """The source in today's form, one note for each old key, and the contradictions that were found on the way."""
    translation = _Translation(source)
    translation.run()
    translated = Source(translation.values, translation.origins)
    notes, faults = translate_sections(translated)
    return translated, translation.notes + notes, translation.faults + faults


def settle(values: dict[str, Value], plugins: object) -> list[Fault]:
    """Settle, when all files of a profile are merged, whether ``model.moe`` is on; the contradictions with `plugins`.

    `values` are changed. `plugins` is what the whole profile lists.
    """
    model = values.get("model")
    ffn = model.get("ffn") if isinstance(model, dict) else None
    if not (isinstance(model, dict) and isinstance(ffn, dict) and _OLD_MOE in ffn):
        return []
    model["ffn"] = ffn = dict(ffn)
    del ffn[_OLD_MOE]
    enabled = ffn.pop(_ENABLED, True)
    listed = isinstance(plugins, list | tuple) and any(
        entry == "moe" or (isinstance(entry, dict) and "moe" in entry) for entry in plugins
    )
    where, what = "model.moe.enabled", "the profile does not list the plugin 'moe'"
    if not isinstance(enabled, bool):
        return [Fault(where, f"{enabled!r} is not allowed", "input should be true or false")]
    if not enabled:
        model["ffn"] = {"provider": "default"}
        what = "false contradicts the plugin 'moe', which the profile lists"
        return [Fault(where, what, "keep one of the two")] if listed else []
    return [] if listed else [Fault(where, what, "add it to plugins, or say enabled: false")]


class _Translation:
    def __init__(self, source: Source) -> None:
        self.values: dict[str, Value] = dict(source.values)
        self.origins = dict(source.origins)
        self.notes: list[str] = []
        self.faults: list[Fault] = []
        model = self.values.get("model")
        self.model: dict[str, Value] = dict(model) if isinstance(model, dict) else {}

    def run(self) -> None:
        if not self.model:
            return
        self._moe()
        for kind in KINDS:
            self._name(kind)
        for section, kind in SECTIONS.items():
            self._section(section, kind)
        self._router_name()
        self._voting()
        self._fields()
        self.values["model"] = self.model

    def _name(self, kind: str) -> None:
        key = f"{kind}_name"
        if key not in self.model:
            return
        name = self.model.pop(key)
        choice = self._choice(kind, key)
        if choice is None:
            return
        if choice.setdefault("provider", name) != name:
            self._contradiction(f"model.{key}", f"{name!r} contradicts model.{kind}.provider: {choice['provider']!r}")
        self._move(("model", key), ("model", kind, "provider"))
        self.notes.append(f"model.{key} is now model.{kind}.provider")

    def _section(self, section: str, kind: str) -> None:
        if section not in self.model:
            return
        options = self.model.pop(section)
        choice = self._choice(kind, section)
        if choice is None or not self._is_mapping(section, options):
            return
        assert isinstance(options, dict)
        for key, value in options.items():
            self._put(choice, kind, (section, key), key, value)
        self.notes.append(f"model.{section} is now model.{kind}")

    def _moe(self) -> None:
        if "moe" not in self.model:
            return
        options = self.model.pop("moe")
        if not self._is_mapping("moe", options):
            return
        assert isinstance(options, dict)
        options = dict(options)
        self.notes.append("model.moe is now model.ffn with provider: moe, and its router model.ffn.router")
        choice = self._choice("ffn", "moe")
        if choice is None:
            return
        if choice.setdefault("provider", "moe") != "moe":
            self._contradiction("model.moe", f"contradicts model.ffn.provider: {choice['provider']!r}")
        self._move(("model", "moe"), ("model", "ffn", "provider"))
        choice[_OLD_MOE] = True
        if "enabled" in options:
            choice[_ENABLED] = options.pop("enabled")
        router = choice.get("router")
        router = dict(router) if isinstance(router, dict) else {"provider": router} if router else {}
        for key, value in options.items():
            if key in _TO_ROUTER:
                router[key] = value
                self._move(("model", "moe", key), ("model", "ffn", "router", key))
            else:
                self._put(choice, "ffn", ("moe", key), key, value)
        if router:
            router.setdefault("provider", "topk_default")
            choice["router"] = router

    def _voting(self) -> None:
        """The options of the voter stood in the model."""
        if "voting" not in self.model:
            return
        options, listed = self.model.pop("voting"), self.values.get("plugins")
        if not self._is_mapping("voting", options):
            return
        if not isinstance(listed, list) or "voter" not in listed:
            self._contradiction("model.voting", "the profile does not list the plugin 'voter'", "add it to plugins")
            return
        self.values["plugins"] = [{"voter": options} if entry == "voter" else entry for entry in listed]
        self.notes.append("model.voting is now the options of the plugin: plugins: [{voter: ...}]")

    def _fields(self) -> None:
        """Plain fields of the predecessor: options of autopoietic attention, or of no use today."""
        attention = self.model.get("attention")
        name = attention.get("provider") if isinstance(attention, dict) else attention
        for key in [key for key in PREDECESSOR if key in self.model]:
            if name == "autopoietic" and key in OF_AUTOPOIETIC:
                choice = self._choice("attention", key)
                assert choice is not None
                self._put(choice, "attention", (key,), key, self.model.pop(key))
                self.notes.append(f"model.{key} is now model.attention.{key}")
            else:
                self.notes.append(f"model.{key} is kept, and nothing reads it")

    def _router_name(self) -> None:
        if "router_name" not in self.model:
            return
        name, ffn = self.model.pop("router_name"), self.model.get("ffn")
        self.notes.append("model.router_name is now model.ffn.router.provider")
        if not isinstance(ffn, dict) or ffn.get("provider") in (None, "default", "swiglu"):
            self.model["router_name"] = name  # kept as a plain field: nothing in this profile routes
            self.notes.pop()
            return
        router = ffn.get("router")
        ffn["router"] = {**router, "provider": name} if isinstance(router, dict) else {"provider": name}
        self._move(("model", "router_name"), ("model", "ffn", "router", "provider"))

    def _choice(self, kind: str, old: str) -> dict[str, Value] | None:
        """The new section of a kind, ready to be added to."""
        present = self.model.get(kind)
        if isinstance(present, str):
            present = {"provider": present}
        if present is not None and not isinstance(present, dict):
            self._contradiction(f"model.{kind}", f"{present!r} is no provider", f"model.{old} cannot be added to it")
            return None
        choice = dict(present or {})
        self.model[kind] = choice
        self.origins.setdefault(("model", kind), self.origins.get(("model", old), Origin("")))
        return choice

    def _put(self, choice: dict[str, Value], kind: str, old: tuple[str, ...], key: str, value: Value) -> None:
        if choice.setdefault(key, value) != value:
            self._contradiction(f"model.{'.'.join(old)}", f"{value!r} contradicts model.{kind}.{key}: {choice[key]!r}")
        self._move(("model", *old), ("model", kind, key))

    def _move(self, old: Key, new: Key) -> None:
        if old in self.origins:
            self.origins[new] = self.origins[old]

    def _is_mapping(self, section: str, value: Value) -> bool:
        if not isinstance(value, dict):
            self._contradiction(f"model.{section}", f"{value!r} is not a mapping of options")
        return isinstance(value, dict)

    def _contradiction(self, where: str, what: str, hint: str = "keep one of the two") -> None:
        self.faults.append(Fault(where, what, hint))
