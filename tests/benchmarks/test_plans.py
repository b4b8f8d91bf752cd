"""Plans: what a text asks for, and every mistake in it at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.plans.plan import Plan, load_plan, parse_plan
from benchmarks.plans.tasks import Task
from edge_adapt.errors import ConfigError

GOOD = """
schema: 1
data:
  cifar: images.npz
  digits: {path: "sklearn:digits"}
bundles:
  small: runs/small
  made: {export: {model: "zoo:vit-tiny", weights: w.safetensors, calibration: "sklearn:digits"}}
grid:
  - bundles: [small]
    data: [cifar]
    methods: [source, moments+label_shift]
    seeds: [0, 1]
    settings: {source: {}}
  - bundles: [small, made]
    data: [cifar]
    methods: [source]
    batch_sizes: [64, 1]
"""


def parsed(text: str) -> Plan:
    return parse_plan(text, "plan.yaml", folder=Path("/plans"))


def mistakes(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parsed(text)
    return str(caught.value)


def test_a_plan_is_the_union_of_its_grids_in_order():
    plan = parsed(GOOD)
    cells = [(one.bundle, one.method, one.seed, one.batch_size) for one in plan.combinations()]
    assert cells == [
        ("small", "source", 0, 64),
        ("small", "source", 1, 64),
        ("small", "moments+label_shift", 0, 64),
        ("small", "moments+label_shift", 1, 64),
        ("small", "source", 0, 1),
        ("made", "source", 0, 64),
        ("made", "source", 0, 1),
    ]
    assert plan.used_data().keys() == {"cifar"}


def test_paths_are_relative_to_the_plan_and_names_are_not():
    text = GOOD.replace("data: [cifar]", "data: [cifar, digits]")
    plan = parsed(text)
    assert plan.used_data()["cifar"].path == "/plans/images.npz"
    assert plan.used_data()["digits"].path == "sklearn:digits"
    assert plan.used_bundles()["small"].path == Path("/plans/runs/small")
    recipe = plan.used_bundles()["made"].export
    assert recipe is not None
    assert (recipe.model, recipe.weights) == ("zoo:vit-tiny", "/plans/w.safetensors")
    assert recipe.calibration == "sklearn:digits"
    assert parsed(text.replace("images.npz", "'har:a.npz'")).used_data()["cifar"].path == "har:/plans/a.npz"
    assert "/plans" not in plan.model_dump_json()


def test_every_mistake_is_told_at_once_with_its_line_and_the_nearest_name():
    told = mistakes(
        """
data: {cifar: images.npz}
bundles: {small: runs/small}
grid:
  bundles: [smal]
  data: [cifra]
  scenarios: [contineual]
  methods: [sourze, moments+lame, moments+lamee]
  engines: [onnxruntim]
  routers: [hcd]
  corruptions: [fogg]
  settings: {tent: {lr: 1}}
"""
    )
    for line, text in (
        (5, "there is no bundle 'smal'; did you mean small"),
        (6, "there is no data 'cifra'; did you mean cifar"),
        (7, "there is no scenario 'contineual'; did you mean continual"),
        (8, "grid[0].methods[0]: there is no method 'sourze'; did you mean source"),
        (8, "grid[0].methods[2]: there is no wrapper 'lamee'; did you mean lame"),
        (9, "there is no engine 'onnxruntim'; did you mean onnxruntime"),
        (10, "there is no router 'hcd'; did you mean hdc"),
        (11, "there is no corruption 'fogg'; did you mean fog"),
        (12, "the grid has no method 'tent'"),
    ):
        assert any(f"plan.yaml:{line}: " in one and text in one for one in told.splitlines()), text
    assert "methods[1]" not in told


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("  seeds: [-1]", "seeds"),
        ("  severity: 6", "severity is 6"),
        ("  batch_sizes: []", "batch_sizes"),
        ("  batch_size: [1]", "did you mean batch_sizes"),
        ("  limit: 0", "limit is 0"),
        ("  timeout_s: 0", "timeout_s is 0"),
        ("  methods: source", "expected a list"),
    ],
)
def test_values_out_of_range_are_refused(line, told):
    methods = "" if "methods" in line else "  methods: [source]\n"
    text = f"data: {{c: c.npz}}\nbundles: {{b: b}}\ngrid:\n  bundles: [b]\n  data: [c]\n{methods}{line}\n"
    assert told in mistakes(text)


def test_a_bundle_is_a_path_or_a_recipe():
    assert "either" in mistakes("data: {c: c}\nbundles: {b: {}}\ngrid: {bundles: [b], data: [c], methods: [source]}")


def test_a_plan_that_is_not_there_or_is_no_text_is_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_plan(tmp_path / "none.yaml")
    (tmp_path / "odd.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_plan(tmp_path / "odd.yaml")
    (tmp_path / "newer.yaml").write_text("schema: 2\ndata: {c: c}\nbundles: {b: b}\ngrid: []\n")
    with pytest.raises(ConfigError, match="schema is 2"):
        load_plan(tmp_path / "newer.yaml")


def test_a_task_travels_as_json():
    for asked in parsed(GOOD).combinations():
        task = Task(combination=asked, bundle_path="b", bundle_id="1", data_source="d", data_digest="2")
        assert Task.from_json(task.to_json()) == task
