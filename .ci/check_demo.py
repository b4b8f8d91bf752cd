"""Hold the demo's results against what the README promises. Exit code 1 if a promise is broken."""

from __future__ import annotations

import json
import sys
from pathlib import Path

MOMENTS_SHARE, HARM = 0.65, 0.5

results = json.loads(Path(sys.argv[1]).read_text())
errors = {row["method"]: row["error_mean"] for row in results["rows"]}
broken = [
    f"{method} errs on {error:.1f} %, source on {errors['source']:.1f} %: more than {HARM} points worse"
    for method, error in errors.items()
    if error > errors["source"] + HARM
]
if errors["moments"] > MOMENTS_SHARE * errors["source"]:
    broken.append(f"moments errs on {errors['moments']:.1f} %, more than {MOMENTS_SHARE} x {errors['source']:.1f} %")
missing = {"source", "moments", "tent", "cotta"} - errors.keys()
if missing or len(results["shifts"]) < 8:
    broken.append(f"methods missing: {sorted(missing)}; shifts: {len(results['shifts'])}, at least 8 expected")
for line in broken:
    print(f"broken promise: {line}")
print(", ".join(f"{method} {error:.1f} %" for method, error in errors.items()))
sys.exit(bool(broken))
