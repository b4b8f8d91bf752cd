"""Keep the figures of a plan to hold later ones against: `baseline.py results.json > baseline.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

BULK = ("timeline", "visits", "events", "entries", "errors")
"""What a comparison does not look at."""

results = json.loads(Path(sys.argv[1]).read_text())
for cell in results["cells"]:
    cell["shifts"] = []
    if cell["row"] is not None:
        cell["row"] = {name: value for name, value in cell["row"].items() if name not in BULK} | {"errors": {}}
kept = {"schema": results["schema"], "environment": results["environment"], "cells": results["cells"]}
print(json.dumps(kept, indent=1))
