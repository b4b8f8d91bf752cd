"""The example package, installed as a stranger would install it: found, replayed, and held to the contract."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "edge_adapt_example"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The package in a folder of its own, installed by pip without network."""
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(EXAMPLE, folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    places = ["--target", folder / "site", folder / "source"]
    done = subprocess.run([*command, *places], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def edge_adapt(site: Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command line in a process that knows the package."""
    program = "import sys; from edge_adapt.cli import main; sys.argv[0] = 'edge-adapt'; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        cwd=cwd,
        check=False,
    )


def test_its_method_scenario_and_source_take_part_in_replay(site, device_bundle, tiny_data, tmp_path):
    np.savez(tmp_path / "tiny.npz", images=tiny_data.images[:64], labels=tiny_data.labels[:64])
    arguments = ["--data", "tiny.npz", "--scenario", "day_and_night", "--method", "source,level", "--json", "a.json"]
    done = edge_adapt(site, "replay", device_bundle.path, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "a.json").read_text())
    assert [shift["name"] for shift in results["shifts"]] == ["day", "dusk", "night"]
    assert [row["method"] for row in results["rows"]] == ["source", "level"]
    assert results["rows"][0]["errors"] != results["rows"][1]["errors"]

    arguments = ["--data", "drifting_square:30", "--scenario", "real", "--method", "level", "--json", "b.json"]
    done = edge_adapt(site, "replay", device_bundle.path, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [row] = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert (row["frames"], row["error_mean"], row["error_estimate"]) == (30, None, None)
    assert "export it again with --estimate" in row["error_estimate_why"]

    done = edge_adapt(site, "replay", device_bundle.path, "--data", "tiny.npz", "--method", "levle", cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean level" in done.stderr


@pytest.mark.slow
def test_it_keeps_the_contract(site, tmp_path):
    done = edge_adapt(site, "contract", "edge-adapt-example", "--json", "verdicts.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = json.loads((tmp_path / "verdicts.json").read_text())["verdicts"]
    left_out = [(verdict["name"], verdict["why"]) for verdict in verdicts if verdict["status"] != "kept"]
    assert left_out == [("level", "keeps the whole of its state")], "compact() is asked only of methods that offer it"
    assert {verdict["name"] for verdict in verdicts} == {"level", "day_and_night", "drifting_square"}


@pytest.mark.slow
def test_its_own_test_passes(site, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", tmp_path, EXAMPLE / "test_level.py"],
        env={**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_they_take_part_in_a_plan_and_its_report(site, device_bundle, tiny_data, tmp_path):
    np.savez(tmp_path / "tiny.npz", images=tiny_data.images[:64], labels=tiny_data.labels[:64])
    (tmp_path / "plan.yaml").write_text(f"""
schema: 1
data: {{tiny: {{path: tiny.npz}}, squares: {{path: "drifting_square:30"}}}}
bundles: {{tiny: {{path: {device_bundle.path}}}}}
grid:
  - {{bundles: [tiny], data: [tiny], scenarios: [day_and_night], methods: [source, level], batch_sizes: [16]}}
  - {{bundles: [tiny], data: [squares], scenarios: [real], methods: [level], label_delay: 8}}
""")
    done = edge_adapt(site, "replay", "plan.yaml", "--out", "made", "--cache", "cache", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cells = json.loads((tmp_path / "made" / "results.json").read_text())["cells"]
    assert [(cell["scenario"], cell["method"], cell["status"]) for cell in cells] == [
        ("day_and_night", "source", "ok"),
        ("day_and_night", "level", "ok"),
        ("real", "level", "ok"),
    ]
    assert cells[2]["label_delay"] == 8
    assert "day_and_night" in (tmp_path / "made" / "report.html").read_text()
