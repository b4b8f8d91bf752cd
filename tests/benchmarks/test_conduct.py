"""Plans carried out: the same table whoever makes the cells, however often it was stopped, whatever was damaged."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import benchmarks.plans.cache as cache_module
import benchmarks.plans.conduct as module
from benchmarks.environment import processor
from benchmarks.plans import images, recipes
from benchmarks.plans.cache import CellCache
from benchmarks.plans.conduct import conduct, resolved
from benchmarks.plans.plan import ExportSpec, Plan, load_plan
from benchmarks.plans.pool import run_pool
from benchmarks.plans.tasks import run_task
from edge_adapt.cli import run
from edge_adapt.errors import ArtifactError, ConfigError, DataError
from edge_adapt.streams import corruptions

COSTS = {
    *("answer_ms", "learn_ms", "extra_mb", "energy_j", "overhead", "plain_ms", "time", "seconds"),
}
"""What may differ from run to run."""


@pytest.fixture(scope="module")
def plan_file(device_bundle, tiny_data, tmp_path_factory) -> Path:
    """Six cells, of which one cannot be."""
    folder = tmp_path_factory.mktemp("plan")
    np.savez(folder / "tiny.npz", images=tiny_data.images, labels=tiny_data.labels)
    text = f"""
data: {{tiny: tiny.npz}}
bundles: {{tiny: {device_bundle.path}}}
grid:
  bundles: [tiny]
  data: [tiny]
  methods: [source, tent, foa]
  seeds: [0, 1]
  batch_sizes: [16]
  limit: 48
  corruptions: [fog, gaussian_noise]
"""
    (folder / "plan.yaml").write_text(text)
    return folder / "plan.yaml"


@pytest.fixture(scope="module")
def plan(plan_file) -> Plan:
    return load_plan(plan_file)


@pytest.fixture(scope="module")
def made_once(plan, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    """What the plan gives one cell after the other, and the cache that it leaves."""
    cache = tmp_path_factory.mktemp("undisturbed")
    return conduct(plan, cache=cache), cache


@pytest.fixture(scope="module")
def undisturbed(made_once) -> dict[str, Any]:
    return made_once[0]


@pytest.fixture
def kept(made_once, tmp_path) -> Path:
    """A copy of the cache with every cell."""
    return Path(shutil.copytree(made_once[1], tmp_path / "kept"))


def table(results: dict[str, Any]) -> list[Any]:
    """All of the cells but what they cost."""
    assert results["schema"] == 2
    return [
        {**cell, "row": cell["row"] and {name: value for name, value in cell["row"].items() if name not in COSTS}}
        for cell in results["cells"]
    ]


def counted(monkeypatch) -> list[int]:
    """How many cells each run made."""
    made: list[int] = []

    def pool(tasks, *, jobs):
        made.append(len(tasks))
        return run_pool(tasks, jobs=jobs)

    monkeypatch.setattr(module, "run_pool", pool)
    return made


def test_cells_are_in_the_order_of_the_plan_with_errors_and_costs(undisturbed):
    cells = undisturbed["cells"]
    assert [(cell["method"], cell["seed"], cell["status"]) for cell in cells] == [
        *(("source", 0, "ok"), ("source", 1, "ok"), ("tent", 0, "ok"), ("tent", 1, "ok")),
        *(("foa", 0, "skipped"), ("foa", 1, "skipped")),
    ]
    assert "takes no prompts" in cells[4]["why"]
    row = cells[2]["row"]
    assert row["errors"].keys() == {"gaussian_noise", "fog"}
    assert row["passes"] >= row["frames"] == 96
    assert row["backward_passes"] > 0
    assert row["state_bytes"] > 0
    assert row["time"] > 0
    assert cells[0]["row"]["backward_passes"] == 0
    assert [shift["name"] for shift in cells[0]["shifts"]] == ["fog", "gaussian_noise"]
    assert json.loads(json.dumps(undisturbed)) == undisturbed


@pytest.mark.slow
def test_two_jobs_give_the_table_of_one(plan, undisturbed, tmp_path):
    assert table(conduct(plan, cache=tmp_path, jobs=2)) == table(undisturbed)


@pytest.mark.slow
def test_ray_gives_the_table_of_one(plan, undisturbed, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed")
    assert table(conduct(plan, cache=tmp_path, jobs=2, by="ray")) == table(undisturbed)


def test_what_was_made_before_is_not_made_again(plan, undisturbed, kept, monkeypatch):
    made, told = counted(monkeypatch), []
    assert conduct(plan, cache=kept, tell=told.append)["cells"] == undisturbed["cells"]
    assert told == ["6 of 6 cells were made before"]
    more = plan.model_copy(update={"grid": (plan.grid[0].model_copy(update={"seeds": (0, 1, 2)}),)})
    assert len(conduct(more, cache=kept)["cells"]) == 9
    assert made == [0, 3]


def test_other_code_data_or_machine_is_another_cell(plan, kept, tmp_path, monkeypatch):
    task = resolved(plan, kept, print)[0]
    here = CellCache(kept / "cells", processor())
    assert here.find(task) is not None
    assert CellCache(kept / "cells", "another").find(task) is None
    assert here.find(dataclasses.replace(task, data_digest="another")) is None
    assert here.find(dataclasses.replace(task, bundle_id="another")) is None
    asked = task.combination
    for change in ({"severity": 4}, {"limit": 47}, {"settings": '{"a": 1}'}, {"corruptions": ("fog",)}, {"threads": 2}):
        assert here.find(dataclasses.replace(task, combination=dataclasses.replace(asked, **change))) is None
    renamed = dataclasses.replace(asked, bundle="other", timeout_s=1.0)
    found = here.find(dataclasses.replace(task, combination=renamed))
    assert found is not None
    assert found["bundle"] == "other"
    monkeypatch.setattr(cache_module, "code_of", lambda what: "another")
    assert here.find(task) is None
    assert not here.damaged


@pytest.mark.parametrize("damage", [b"", b"{}", b"0" * 64 + b"\n{}", None])
def test_a_damaged_cell_is_not_believed(plan, kept, damage):
    here = CellCache(kept / "cells", processor())
    task = resolved(plan, kept, print)[0]
    (file,) = [file for file in kept.rglob("*.cell") if here.key(task) in file.name]
    data = file.read_bytes()
    file.write_bytes(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:] if damage is None else damage)
    assert here.find(task) is None
    assert here.damaged == [file]


def test_a_damaged_cell_is_made_again_and_told(plan, undisturbed, kept, monkeypatch):
    made, told = counted(monkeypatch), []
    file = sorted((kept / "cells").rglob("*.cell"))[0]
    file.write_bytes(b"damaged")
    assert table(conduct(plan, cache=kept, tell=told.append)) == table(undisturbed)
    assert told[0] == f"{file} is damaged; its cell is made again"
    conduct(plan, cache=kept)
    assert made == [1, 0]


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on(plan_file, undisturbed, tmp_path):
    """SIGKILL to the command alone: nobody tidies up after it."""
    out, random_s = tmp_path / "out", random.Random(0)
    command = [
        *(sys.executable, "-c", "from edge_adapt.cli import main; main()"),
        *("replay", str(plan_file), "--cache", str(tmp_path / "cache"), "--out", str(out), "--jobs", "2"),
    ]
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
        cells = len(list((tmp_path / "cache").rglob("*.cell")))
        wait_for(lambda cells=cells: len(list((tmp_path / "cache").rglob("*.cell"))) > cells, process)
        time.sleep(random_s.uniform(0, 0.3))
        process.kill()
        process.wait()
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    assert table(json.loads((out / "results.json").read_text())) == table(undisturbed)


def wait_for(done, process: subprocess.Popen) -> None:
    """Until a cell more is there, or all are."""
    deadline = time.monotonic() + 300
    while not done() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def one_missing(kept: Path) -> None:
    """Forget one cell of tent."""
    next(file for file in sorted(kept.rglob("*.cell")) if b'"method": "tent"' in file.read_bytes()).unlink()


@pytest.mark.slow
def test_ctrl_c_leaves_what_is_done(plan_file, plan, undisturbed, tmp_path, monkeypatch):
    def interrupted(tasks, *, jobs):
        for number, cell in run_pool(tasks, jobs=jobs):
            yield number, cell
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_pool", interrupted)
    assert run(["replay", str(plan_file), "--cache", str(tmp_path), "--out", str(tmp_path / "out")]) == 130
    monkeypatch.undo()
    made = counted(monkeypatch)
    assert table(conduct(plan, cache=tmp_path)) == table(undisturbed)
    assert made == [5]


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_half_written(plan, undisturbed, kept, monkeypatch):
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, os.strerror(28))

    one_missing(kept)
    files = sorted(kept.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "write_atomically", full)
        with pytest.raises(ArtifactError, match="No space left on device"):
            conduct(plan, cache=kept)
    assert sorted(kept.rglob("*")) == files
    assert table(conduct(plan, cache=kept)) == table(undisturbed)


def test_failures_are_cells_and_are_tried_again(plan, undisturbed, kept, monkeypatch):
    one_missing(kept)
    monkeypatch.setattr(module, "run_pool", lambda tasks, *, jobs: run_pool(tasks, jobs=jobs, work=killed_for_tent))
    cells = conduct(plan, cache=kept)["cells"]
    assert sorted(cell["status"] for cell in cells) == ["failed", "ok", "ok", "ok", "skipped", "skipped"]
    monkeypatch.undo()
    made = counted(monkeypatch)
    assert table(conduct(plan, cache=kept)) == table(undisturbed)
    assert made == [1]


def killed_for_tent(task):
    if task.combination.method == "tent":
        os.kill(os.getpid(), signal.SIGKILL)
    return run_task(task)


def test_what_is_not_there_is_named_before_anything_begins(plan, tmp_path):
    missing = plan.model_copy(update={"data": {"tiny": plan.data["tiny"].model_copy(update={"path": "/none.npz"})}})
    with pytest.raises(DataError, match=r"/none\.npz cannot be read"):
        conduct(missing, cache=tmp_path)
    gone = plan.model_copy(update={"bundles": {"tiny": plan.bundles["tiny"].model_copy(update={"path": tmp_path})}})
    with pytest.raises(ArtifactError, match="is no bundle"):
        conduct(gone, cache=tmp_path)
    with pytest.raises(ConfigError, match="--jobs is 0"):
        conduct(plan, cache=tmp_path, jobs=0)
    with pytest.raises(ConfigError, match="onnxruntime"):
        conduct(plan, cache=tmp_path, by="onnxruntime")


def test_an_option_of_the_other_kind_of_replay_is_refused(plan_file, device_bundle, tmp_path, capsys):
    assert run(["replay", str(plan_file), "--data", "x.npz", "--seed", "1"]) == 2
    assert "--data, --seed stands in the plan" in capsys.readouterr().err
    assert run(["replay", str(device_bundle.path), "--data", "x.npz", "--jobs", "2"]) == 2
    assert "--jobs belongs to a plan" in capsys.readouterr().err
    assert run(["replay", str(device_bundle.path), "--data", "x.npz", "--engine", "ray"]) == 2
    assert "ray is no engine of inference" in capsys.readouterr().err
    assert run(["replay", str(device_bundle.path)]) == 2
    assert "--data is missing" in capsys.readouterr().err


def test_corrupted_images_are_made_once(tmp_path, monkeypatch):
    clean = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), np.uint8)
    made = corruptions.corrupt(clean, "fog", 3, seed=1)
    with images.kept_in(tmp_path):
        first = images.corrupt(clean, "fog", 3, seed=1)
        monkeypatch.setattr(corruptions, "corrupt", lambda *args, **more: pytest.fail("made again"))
        again = images.corrupt(clean, "fog", 3, seed=1)
    np.testing.assert_array_equal(first, made)
    np.testing.assert_array_equal(again, made)
    monkeypatch.undo()
    with images.kept_in(tmp_path):
        others = [("fog", 3, 2), ("fog", 4, 1), ("frost", 3, 1)]
        for name, severity, seed in others:
            expected = corruptions.corrupt(clean, name, severity, seed=seed)
            np.testing.assert_array_equal(images.corrupt(clean, name, severity, seed=seed), expected)
    assert len(list(tmp_path.glob("*.images"))) == 4


def test_a_damaged_file_of_images_is_made_again(tmp_path):
    clean = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), np.uint8)
    with images.kept_in(tmp_path):
        made = images.corrupt(clean, "fog", 3, seed=1)
        (file,) = tmp_path.glob("*.images")
        for damaged in (b"", file.read_bytes()[:-1], file.read_bytes()[:-1] + b"?"):
            file.write_bytes(damaged)
            np.testing.assert_array_equal(images.corrupt(clean, "fog", 3, seed=1), made)


def test_a_recipe_is_exported_once_for_what_it_is_made_of(tmp_path, monkeypatch):
    made: list[str] = []

    def export(recipe: ExportSpec, out: Path) -> None:
        made.append(recipe.model)
        out.mkdir()
        (out / "manifest.json").write_text("{}")

    monkeypatch.setattr(recipes, "_in_own_process", export)
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"1")
    recipe, told = ExportSpec(model="zoo:vit-tiny", weights=str(weights)), []
    first = recipes.exported(recipe, tmp_path / "bundles", told.append)
    assert recipes.exported(recipe, tmp_path / "bundles", told.append) == first
    assert told == ["exporting zoo:vit-tiny"]
    weights.write_bytes(b"2")
    assert recipes.exported(recipe, tmp_path / "bundles", told.append) != first
    assert recipes.exported(recipe.model_copy(update={"cut": "input"}), tmp_path / "bundles", told.append) != first
    assert len(made) == 3


def test_an_export_that_fails_says_why(tmp_path):
    with pytest.raises(ArtifactError, match="zoo:non cannot be exported"):
        recipes.exported(ExportSpec(model="zoo:non"), tmp_path, print)
    assert not list(tmp_path.glob("*/manifest.json"))
