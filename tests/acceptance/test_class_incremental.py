"""What LAE promises where classes come one task after the other: more kept than by fine-tuning the same adapter."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.class_incremental import Classes, class_incremental, table
from edge_adapt.bundle import Bundle
from edge_adapt.streams.data import load_data
from exporters.export import export, from_spec


@pytest.mark.slow
def test_lae_beats_fine_tuning_and_keeps_old_classes(shared_data: Path, tmp_path: Path) -> None:
    """ResNet-56 cut before its last three blocks, 100 labelled frames of each class, each seen once."""
    train, test = (load_data(shared_data / f"cifar10_{part}.npz") for part in ("train_10k", "test"))
    assert train.images is not None
    model = from_spec("zoo:cifar-resnet56", weights=shared_data / "models" / "cifar10_resnet56.safetensors")
    bundle = Bundle.load(export(model, tmp_path / "bundle", calibration=train.images[:256], cut="layer3.5"))
    plan = Classes(methods=("fine-tuning", "lae"), train=100, test=30)
    results = class_incremental(bundle, train, test, plan)
    rows = {row["method"]: row for row in results["rows"]}
    assert rows["lae"]["last"] >= rows["fine-tuning"]["last"] + 5
    assert rows["lae"]["old"] >= rows["fine-tuning"]["old"] + 5
    assert rows["lae"]["forgetting"] <= 15
    assert rows["lae"]["one_pass"] >= rows["fine-tuning"]["one_pass"] + 5
    assert "was trained on all of these classes" in table(results)
