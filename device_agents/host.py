"""What the board tells about itself: memory, threads, open files, temperature and power, from /proc and /sys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

ROOT = Path("/")
COLDEST_C, HOTTEST_C = -40.0, 150.0
"""A zone outside is one that is switched off, and tells nonsense."""
INPUT_RAILS = ("VDD_IN", "POM_5V_IN", "VIN_SYS", "5V_IN")
"""Rails of Jetson boards through which everything flows; the others are parts of them."""
INA = ("ina3221", "ina2", "ina1")


def read_host(root: Path = ROOT) -> Mapping[str, float]:
    """rss_mb (MiB), threads, fds, temperature_c (hottest zone), power_w; only what can be read. Never raises.

    Takes well under a millisecond, but reads files of the kernel: not for the thread that answers.
    """
    facts = _process(root)
    temperatures = [value for value in _zones(root) if COLDEST_C <= value <= HOTTEST_C]
    if temperatures:
        facts["temperature_c"] = max(temperatures)
    power = board_power_w(dict(_rails(root)))
    if power is not None:
        facts["power_w"] = power
    return facts


def board_power_w(rails: Mapping[str, float]) -> float | None:
    """Power of the whole board from rail -> watts: the rail that feeds it, else the sum of those that are there."""
    for wanted in INPUT_RAILS:
        for name, watts in rails.items():
            if wanted in name.upper():
                return watts
    return sum(rails.values()) if rails else None


def _process(root: Path) -> dict[str, float]:
    facts: dict[str, float] = {}
    status = dict(line.split(":", 1) for line in (_text(root / "proc/self/status") or "").splitlines() if ":" in line)
    with suppress(KeyError, ValueError, IndexError):
        facts["rss_mb"] = int(status["VmRSS"].split()[0]) / 1024
    with suppress(KeyError, ValueError):
        facts["threads"] = float(int(status["Threads"]))
    with suppress(OSError):
        facts["fds"] = float(sum(1 for _ in (root / "proc/self/fd").iterdir()))
    return facts


def _zones(root: Path) -> Iterator[float]:
    """Degrees Celsius of every thermal zone that answers; a part that sleeps gives an error instead."""
    for zone in _found(root / "sys/class/thermal", "thermal_zone*"):
        value = _number(zone / "temp")
        if value is not None:
            yield value / 1000


def _rails(root: Path) -> Iterator[tuple[str, float]]:
    """Rail -> watts of every power monitor of the INA family."""
    for chip in _found(root / "sys/class/hwmon", "hwmon*"):
        kind = _text(chip / "name")
        if kind is None or not kind.startswith(INA):
            continue
        for volts in _found(chip, "in*_input"):
            index = volts.name[2:].partition("_")[0]
            millivolts, milliamperes = _number(volts), _number(chip / f"curr{index}_input")
            if millivolts is not None and milliamperes is not None:
                name = _text(chip / f"in{index}_label") or f"{chip.name}.{index}"
                yield name, millivolts * milliamperes / 1e6
        microwatts = _number(chip / "power1_input")
        if kind != "ina3221" and microwatts is not None:
            # A chip with one channel tells its power itself, and voltage and current under other numbers.
            yield chip.name, microwatts / 1e6


def _found(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def _text(path: Path) -> str | None:
    try:
        return path.read_bytes()[:4096].decode("utf-8", "replace").strip()
    except OSError:
        return None


def _number(path: Path) -> float | None:
    try:
        return float(_text(path) or "")
    except ValueError:
        return None
