"""Which guards a method gets when nobody says otherwise, and how to say otherwise.

The setting `guards` of a method is True or False for all or none, or a list of names; without it, every method that
learns on the device gets all of them, and none has any in reference mode, where methods run as published.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edge_adapt.errors import ConfigError, did_you_mean
from edge_adapt.guards.finite import Finite
from edge_adapt.guards.narrow import Kept, Narrow
from edge_adapt.guards.narrow import taught as never_narrow
from edge_adapt.guards.repeated import Repeated
from edge_adapt.guards.reset import Reset
from edge_adapt.guards.strange import Strange
from edge_adapt.guards.watchdog import Watch, Watchdog, taught
from edge_adapt.methods.protocol import Context, Labelled, LearnsFromLabels, Method, Step
from edge_adapt.methods.wrapper import Wrapped, Wrapper

GUARDS: dict[str, type[Wrapper[Any]]] = {
    Narrow.name: Narrow,
    "repeated": Repeated,
    "strange": Strange,
    "watchdog": Watchdog,
    "reset": Reset,
    "finite": Finite,
}
"""Name -> guard, the innermost first. Those inside want to see no answer, and cost an unseen frame nothing."""
SETTING = "guards"


def guarded(method: Method[Any], context: Context) -> Method[Any]:
    """The method, with its wrappers, inside its guards. Raises: ConfigError for a guard that there is not."""
    for name in wanted(method, context):
        if name != Narrow.name or Narrow.serves(method, context.bundle):
            method = taught_too(GUARDS[name], method)(context, method)
    return method


def taught_too(kind: type[Wrapper[Any]], method: Method[Any]) -> type[Wrapper[Any]]:
    """The kind of guard or router that goes around a method: it hands on labels, if the method learns from them."""
    return type(kind.__name__, (kind, _TakesLabels), {}) if isinstance(method, LearnsFromLabels) else kind


def wanted(method: Method[Any], context: Context) -> list[str]:
    """Names of the guards of a method, the innermost first. One that sees nothing needs none."""
    setting = context.settings.get(SETTING, None if context.reference else True)
    if not setting:
        return []
    if isinstance(setting, (list, tuple)):
        for name in setting:
            if name not in GUARDS:
                raise ConfigError(f"there is no guard {name!r}", remedy=did_you_mean(str(name), GUARDS))
        return [name for name in GUARDS if name in setting]
    if setting is not True:
        raise ConfigError(
            f"{SETTING} is {setting!r}, expected true, false or a list", remedy=f"known guards: {', '.join(GUARDS)}"
        )
    if not method.needs and not method.watches:
        return []
    # What a person taught it is no drift, and not to be undone after a while.
    return [name for name in GUARDS if name != "reset" or not isinstance(method, LearnsFromLabels)]


class _TakesLabels:
    """What a guard has besides, around a method that learns from labels."""

    host: Any

    def learn_from(self, state: Wrapped[Any], labelled: Labelled) -> Step[Wrapped[Any]]:
        step = self.host.learn_from(state.host, labelled)
        own = taught(state.own) if isinstance(state.own, Watch) else state.own
        own = never_narrow(own) if isinstance(own, Kept) else own
        return replace(step, state=Wrapped(step.state, own))

    def predict(self, state: Wrapped[Any], cut: Any) -> Any:
        return self.host.predict(state.host, cut)
