"""Who may ask the page, and who may press its buttons: it has no password, so other web sites must be kept out. Pure.

A web site that the user visits runs in the same browser. It could send commands to the loopback address (cross-site
requests), or let its own name point there and read everything (DNS rebinding). Against the first: a token that only
the page itself carries, and the origin of the request. Against the second: the name in `Host`.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Mapping
from urllib.parse import urlsplit

TOKEN_HEADER = "x-edge-adapt-token"
MOST_BODY = 1024
"""Bytes of a command: it says little."""


def own_names(host: str) -> frozenset[str]:
    """Names under which the page may be asked for, besides addresses."""
    names = {"localhost", host.lower()}
    if not is_loopback(host):
        machine = socket.gethostname().lower()
        names |= {machine, f"{machine.partition('.')[0]}.local"}
    return frozenset(names)


def is_loopback(host: str) -> bool:
    """True if only this machine reaches that address or name."""
    address = _address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


def host_refused(host_header: str, names: frozenset[str], *, bound: str) -> str | None:
    """Why a request for that host is refused, or None. A foreign name that points here is never an address."""
    name = _host_of(f"http://{host_header}")
    if name is None:
        return "the Host header is no host"
    if name in names:
        return None
    address = _address(name)
    if address is not None and (address.is_loopback or not is_loopback(bound)):
        return None
    return f"this page is not called {name!r}"


def command_refused(headers: Mapping[str, str], token: str) -> str | None:
    """Why a command is refused, or None. Header names in lower case."""
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return "a command is application/json"
    if headers.get("sec-fetch-site", "same-origin") != "same-origin":
        return "commands come from the page itself, not from another site"
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
        return "commands come from the page itself, not from another site"
    if not hmac.compare_digest(headers.get(TOKEN_HEADER, "").encode(), token.encode()):
        return "the token is missing or of another run of the agent: load the page again"
    return None


def _host_of(url: str) -> str | None:
    try:
        name = urlsplit(url).hostname
    except ValueError:
        return None
    return name.rstrip(".") if name else None


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
