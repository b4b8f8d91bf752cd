"""From a name to a method: `tent`, or `moments+label_shift` for one inside another. Refused here what cannot serve."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edge_adapt.bundle import Bundle
from edge_adapt.errors import ConfigError
from edge_adapt.guards.default import SETTING, guarded, taught_too
from edge_adapt.methods.auto import AUTO, choose
from edge_adapt.methods.protocol import GRADIENTS, HEAD, IMAGES, PROMPTS, SITES, Context, Method
from edge_adapt.plugins import METHODS, ROUTERS, WRAPPERS, find, sound

ROUTER = "router"
"""Name of the setting that asks for a router."""
NO_ROUTER, OWN_ROUTER = "none", "hdc"

LACKS = {
    SITES: "has no norm site",
    HEAD: "does not end in a linear layer",
    GRADIENTS: "has nothing in its tail to learn",
    PROMPTS: "takes no prompts",
    IMAGES: "is not fed images of one or three channels",
}


def build(name: str, context: Context) -> Method[Any]:
    """A method by its name, with wrappers behind plus signs, the innermost first, and its guards around all.

    `auto` is the composition that `auto.py` chooses for the bundle.

    Settings of `context` go to the method; those of a wrapper stand under its name, `guards` says which guards, and
    `router` which router.
    Raises: ConfigError if there is no such method, or if the bundle cannot serve it: then it says which one would fit.
    """
    host, *wrappers = name.split("+")
    if host == AUTO:
        return build("+".join((choose(context.bundle), *wrappers)), context)
    settings = {key: value for key, value in context.settings.items() if key not in (*wrappers, SETTING, ROUTER)}
    build_host = find(METHODS, host)
    check(host, build_host.requires, context.bundle)
    method: Method[Any] = build_host(replace(context, settings=settings))
    for wrapper in wrappers:
        build_wrapper = find(WRAPPERS, wrapper)
        check(wrapper, build_wrapper.demands, context.bundle)
        method = build_wrapper(replace(context, settings=context.settings.get(wrapper, {})), method)
    return routed(guarded(method, context), context)


def routed(method: Method[Any], context: Context) -> Method[Any]:
    """The method behind a router, where the setting `router` asks for one: its name, or a dict of its settings.

    "none" is none. A dict is for "hdc", or for what it holds under `kind`.
    Raises: ConfigError if there is none of that name, or if the bundle or the method cannot serve it.
    """
    setting = context.settings.get(ROUTER, NO_ROUTER)
    settings = dict(setting) if isinstance(setting, dict) else {}
    kind = settings.pop("kind", OWN_ROUTER) if isinstance(setting, dict) else setting
    if kind == NO_ROUTER:
        return method
    return taught_too(find(ROUTERS, str(kind)), method)(replace(context, settings=settings), method)


def check(name: str, requires: frozenset[str], bundle: Bundle) -> None:
    """Raises: ConfigError if the bundle lacks something that the method requires."""
    missing = requires - offers(bundle)
    if not missing:
        return
    reasons = " and ".join(LACKS[lack] for lack in sorted(missing))
    raise ConfigError(
        f"{name} cannot run on bundle {bundle.manifest.name!r}, which {reasons}",
        remedy=f"these can: {', '.join(fitting(bundle))}",
    )


def fitting(bundle: Bundle) -> list[str]:
    """Names of the installed methods that the bundle can serve."""
    offered = offers(bundle)
    return [name for name, method in sound(METHODS).items() if method.requires <= offered]


def offers(bundle: Bundle) -> frozenset[str]:
    """What a bundle has of all that a method may require."""
    manifest = bundle.manifest
    in_tail = bundle.is_reference or any(site.in_tail for site in manifest.sites)
    has = {
        SITES: bool(manifest.sites),
        HEAD: manifest.head is not None,
        GRADIENTS: in_tail,
        PROMPTS: bool(manifest.prompts),
        IMAGES: manifest.input.layout != "NCW" and len(manifest.input.shape) == 3 and manifest.input.channels in (1, 3),
    }
    return frozenset(name for name, present in has.items() if present)
