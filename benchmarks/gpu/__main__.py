"""`python -m benchmarks.gpu BUNDLE [--json FILE] [--limit-s 540]`: every part in turn; what cannot run says why."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.device import board, engine_facts, learner_facts, line_of
from benchmarks.environment import environment
from benchmarks.gpu.cuda import beside, network, out_of_memory
from edge_adapt.bundle import Bundle
from edge_adapt.delta import write_atomically
from edge_adapt.threads import one_thread

ENGINES = (
    *("onnxruntime", "onnxruntime_cuda", "onnxruntime_tensorrt"),
    *("tensorrt", "tensorrt_fp16", "tensorrt_int8"),
)
LIMIT_S, ROUNDS = 540.0, 300


def measure(bundle: Bundle, limit_s: float, rounds: int) -> dict[str, Any]:
    """Every part, until the time is over; each prints its line."""
    deadline = time.monotonic() + limit_s

    def left() -> float:
        return max(1.0, deadline - time.monotonic())

    parts: list[tuple[str, Any]] = [
        ("tent on cpu", lambda: learner_facts(bundle, "cpu", rounds=rounds // 10)),
        ("tent on cuda", lambda: learner_facts(bundle, "cuda", rounds=rounds)),
        ("torch on cuda", lambda: network(bundle, rounds=rounds, graphs=False)),
        ("torch, CUDA graph", lambda: network(bundle, rounds=rounds, graphs=True)),
        ("answers beside learning", lambda: beside(bundle, rounds=rounds)),
        ("GPU out of memory", lambda: out_of_memory(bundle)),
    ]
    for name in ENGINES:
        parts.append(
            (name, lambda name=name: engine_facts(bundle, name, rounds=rounds, threads=1, wait_s=left() / 2))
        )
    rows = []
    for name, part in parts:
        row = part() if time.monotonic() < deadline else {"name": name, "status": "skipped", "why": "no time is left"}
        rows.append(row)
        print(line_of(row) if "text" not in row else f"{row['name']:>22}  {row['text']}", flush=True)
    described = "; ".join(row["description"] for row in rows if "description" in row)
    return {
        "bundle": {"name": bundle.manifest.name, "id": bundle.id},
        "board": board(),
        "rows": rows,
        "environment": environment(1, described),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("bundle", type=Path, help="folder of a bundle")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="no part begins after so many seconds")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    one_thread()
    figures = measure(Bundle.load(given.bundle), given.limit_s, given.rounds)
    print(f"{'board':>22}  {figures['board']['gpu'] or 'no GPU'}, {figures['board']['model'] or 'unknown'}")
    if given.json is not None:
        write_atomically(given.json, (json.dumps(figures, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
