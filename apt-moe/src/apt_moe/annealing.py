"""The plugin `routing`: a profile that lists it means to anneal its router, and is refused where it would not.

The annealing itself is the schedules' work: `route_temp` and `moe_capacity` belong to the router and the mixture, and reach their
buffers without any plugin. What a list of names can add is that a schedule which was forgotten does not pass in silence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from apt.core import registry
from apt.core.providers import Plugin
from apt.core.resolve import walk
from apt.errors import Fault, ProfileError
from apt.hookspecs import hookimpl

if TYPE_CHECKING:
    from apt.core.config import APTConfig

ANNEALED = ("route_temp", "moe_capacity")
_SWITCHES = ("enable_routing_at_epoch", "enable_routing_at_step")


class RoutingPlugin(Plugin):
    """The predecessor's `routing`: the router's temperature and the experts' capacity are scheduled, and something reads them."""

    api_level: ClassVar[int] = 1

    @hookimpl
    def apt_config_resolved(self, config: APTConfig) -> None:
        """Refuse a profile that schedules neither value, and a switch, which a schedule has no use for."""
        ffn = registry.resolve("ffn", config.choice("ffn")).provider
        offered = {name for _, part in walk(ffn, "model.ffn") for name in part.scheduled}
        known = [name for name in ANNEALED if name in offered]
        faults = []
        if not known:
            hint = "set model.ffn.provider to moe, or leave the plugin out"
            faults.append(Fault("plugins", f"'routing' has nothing to anneal: the ffn is {config.ffn_name!r}", hint))
        elif not any(name in config.schedules for name in known):
            hint = f"schedule {' or '.join(known)}, or leave the plugin out"
            faults.append(Fault("plugins", "'routing' anneals nothing: no schedule moves the router", hint))
        for key in _SWITCHES:
            if config.schedules.get(key):
                hint = "give the schedule a warmup: until then it stays at its start"
                faults.append(Fault(f"schedules.{key}", "annealing has no switch", hint))
        if faults:
            raise ProfileError(faults)
