"""Fuzz: 100,000 payloads over every topic that an agent listens to, and 20,000 mutated configurations.

Usage: fuzz.py [--count 100000] [--short] [--seed 0]. A fifth as many configurations as payloads. The same seed draws
the same; what fails is printed with what it takes to see it again.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from stand import HERE, Promise, arguments, count_of, finish

sys.path.insert(0, str(HERE.parent / "fuzz"))

import config_fuzz
import payload_fuzz

SHOWN, WIDE = 5, 10.0
SLOWEST_MS, SLOWEST_CONFIGURATION_S = 50.0, 2.0
"""CPU time of one payload, and of the largest text that a configuration may have."""


def main() -> int:
    parser = arguments(__doc__ or "", 100_000, 4_000, "payloads")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    count = count_of(asked)
    with tempfile.TemporaryDirectory() as folder:
        payloads = payload_fuzz.fuzz(count, asked.seed, Path(folder))
    print(payloads.table(), end="\n\n")
    configurations = config_fuzz.fuzz(count // 5, asked.seed)
    print(configurations.table(), end="\n\n")
    for told in (*payloads.failures[:SHOWN], *configurations.crashes[:SHOWN]):
        print(told)
    facts = {"seed": asked.seed, **payloads.as_dict(), "configurations": dict(configurations.outcomes)}
    return finish("fuzz", asked, promises(payloads, configurations), facts)


def promises(payloads: payload_fuzz.Result, configurations: config_fuzz.Found) -> list[Promise]:
    """What has to hold."""
    kinds = len({outcome for _, outcome in payloads.outcomes})
    failures, crashes = len(payloads.failures), len(configurations.crashes)
    slowest = configurations.slowest_s
    return [
        Promise(
            f"{payloads.count:,} payloads: nothing raises, changes or stays unnamed",
            f"{failures} do, {kinds} outcomes",
            failures == 0,
        ),
        Promise(
            f"a payload is refused within {SLOWEST_MS:g} ms of CPU",
            f"{payloads.slowest_ms:.1f} ms",
            payloads.slowest_ms <= SLOWEST_MS,
            wide=payloads.slowest_ms <= WIDE * SLOWEST_MS,
        ),
        Promise(
            f"{configurations.outcomes.total():,} configurations: settings, or an error with its line",
            f"{crashes} otherwise",
            crashes == 0,
        ),
        Promise(
            f"a configuration takes at most {SLOWEST_CONFIGURATION_S:g} s of CPU",
            f"{slowest:.2f} s",
            slowest <= SLOWEST_CONFIGURATION_S,
            wide=slowest <= WIDE * SLOWEST_CONFIGURATION_S,
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
