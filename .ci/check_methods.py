"""Hold the promises about methods against the figures of a short sweep: `check_methods.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.sweep_report import summaries

HARM = 0.5
"""Points of mean error above source that no method on the device may have."""
DESTRUCTIVE = ("lame",)
"""Published to be destructive on streams like this one; on the device a gate holds it back."""


def main(folder: Path) -> None:
    device = {row.method: row.error for row in summaries(folder, "resnet20-device")}
    reference = {row.method: row.error for row in summaries(folder, "resnet20-reference")}
    checks = {f"{method} does no harm": error <= device["source"] + HARM for method, error in device.items()}
    published = {method: error for method, error in reference.items() if method not in DESTRUCTIVE}
    checks |= {
        "auto is within a point of the best in reference mode": device["auto"] <= min(published.values()) + 1.0,
        "auto takes back a third of the error": device["auto"] <= device["source"] * 2 / 3,
        "batch statistics are better than source": reference["norm"] <= reference["source"] - 10,
        "label shift costs nothing on a balanced stream": device["moments+label_shift"] <= device["moments"] + HARM,
    }
    for promise, holds in checks.items():
        print(f"{'ok  ' if holds else 'FAIL'} {promise}")
    if not all(checks.values()):
        sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
