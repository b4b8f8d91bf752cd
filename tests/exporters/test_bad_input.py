"""What users get wrong: every command answers with one clear message, and leaves nothing behind."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import WRONG, copy_of
from safetensors.torch import save_file

from edge_adapt.bundle import FULL, MANIFEST, SOURCE, TAIL, TRUNK
from edge_adapt.cli import run

# Models --------------------------------------------------------------------------------------------------------------


def test_an_unknown_zoo_model_gets_the_nearest_name(refused, tmp_path):
    shown = refused("export", "zoo:cifar-resnet2", "--out", tmp_path / "out")
    assert "cifar-resnet2" in shown
    assert re.search("did you mean .*cifar-resnet20", shown)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("no_such_package_here:factory", "no_such_package_here"),
        ("users_models:absent", "absent"),
        ("users_models:largest", "ArgMax"),
        ("users_models:no_module", "int"),
        ("users_models:no_shape", "input_shape"),
        ("not a model", "'not a model'"),
        ("nowhere.onnx", "nowhere.onnx"),
        ("zoo:", "''"),
    ],
)
def test_a_model_that_cannot_be_had_is_named(spec, said, refused, factories, tmp_path):
    assert said in refused("export", spec, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_onnx_is_named(refused, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"this is no protobuf" * 20)
    assert "bad.onnx" in refused("export", tmp_path / "bad.onnx", "--out", tmp_path / "out")


@pytest.mark.parametrize(("factory", "operator"), [("spectral", "svd"), ("eigen", "eigh")])
def test_an_operator_that_cannot_be_exported_is_named_with_its_module(factory, operator, refused, factories, tmp_path):
    shown = refused("export", f"{factories}:{factory}", "--out", tmp_path / "out")
    assert operator in shown
    assert "in module body" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cut", ["no.such.layer", "con"])
def test_a_cut_that_is_no_tensor_is_refused(cut, refused, factories, tmp_path):
    shown = refused("export", f"{factories}:small", "--cut", cut, "--out", tmp_path / "out")
    assert repr(cut) in shown
    assert "conv" in shown
    assert list(tmp_path.iterdir()) == [tmp_path / "code"]


def test_a_cut_that_something_goes_around_is_refused(refused, factories, tmp_path):
    shown = refused("export", f"{factories}:shortcut", "--cut", "bn", "--out", tmp_path / "out")
    assert "'bn'" in shown
    assert "does not separate" in shown
    assert list(tmp_path.iterdir()) == [tmp_path / "code"]


def test_weights_that_do_not_fit_are_named_by_their_first_three_keys(refused, factories, tmp_path):
    weights = {f"layer{index}.weight": torch.zeros(2) for index in range(5)}
    save_file(weights, tmp_path / "weights.safetensors")
    shown = refused(
        "export", f"{factories}:small", "--weights", tmp_path / "weights.safetensors", "--out", tmp_path / "out"
    )
    assert "5 unexpected (layer0.weight, layer1.weight, layer2.weight, ...)" in shown
    assert "conv.weight, conv.bias, bn.weight, ..." in shown
    assert not (tmp_path / "out").exists()


def test_an_unknown_precision_is_refused(refused, factories, tmp_path):
    assert "int3" in refused("export", f"{factories}:small", "--precision", "int3", "--out", tmp_path / "out")


def test_an_existing_bundle_is_kept_unless_forced(refused, factories, tmp_path):
    out = tmp_path / "bundle"
    assert run(["export", f"{factories}:small", "--out", str(out)]) == 0
    before = (out / MANIFEST).read_bytes()
    assert "--force" in refused("export", f"{factories}:small", "--out", out)
    assert (out / MANIFEST).read_bytes() == before
    assert run(["export", f"{factories}:small", "--out", str(out), "--force"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "code"]


def test_a_folder_that_is_no_bundle_is_never_replaced(refused, factories, tmp_path):
    precious = tmp_path / "photos"
    precious.mkdir()
    (precious / "me.jpg").write_bytes(b"precious")
    refused("export", f"{factories}:small", "--out", precious, "--force")
    assert (precious / "me.jpg").read_bytes() == b"precious"


# Calibration ---------------------------------------------------------------------------------------------------------

GOOD = np.random.default_rng(0).uniform(0, 1, (6, 3, 8, 8)).astype(np.float32)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (np.zeros((6, 3, 9, 8), np.float32), "(3, 9, 8)"),
        (np.zeros((6, 5), np.float32), "(5,)"),
        (np.zeros((6, 3, 8, 8), np.int64), "int64"),
        (np.zeros((6, 3, 8, 8), np.complex64), "complex64"),
        (np.full((6, 3, 8, 8), "x"), "<U1"),
        (np.where(np.arange(6)[:, None, None, None] == 4, np.nan, GOOD), "NaN"),
        (np.where(np.arange(6)[:, None, None, None] == 4, np.inf, GOOD), "infinite"),
        (np.zeros((0, 3, 8, 8), np.float32), "empty"),
        (np.float32(1), "()"),
    ],
    ids=["shape", "rank", "integers", "complex", "text", "nan", "inf", "empty", "scalar"],
)
def test_calibration_that_does_not_fit_is_refused(images, said, refused, factories, tmp_path):
    np.savez(tmp_path / "source.npz", images=images)
    shown = refused("export", f"{factories}:small", "--calibration", tmp_path / "source.npz", "--out", tmp_path / "out")
    assert said in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["code", "source.npz"]


def test_calibration_that_is_no_archive_is_refused(refused, factories, tmp_path):
    (tmp_path / "source.npz").write_bytes(b"PK nothing")
    arguments = ["--calibration", tmp_path / "source.npz", "--out", tmp_path / "out"]
    assert "source.npz" in refused("export", f"{factories}:small", *arguments)
    (tmp_path / "source.npz").unlink()
    assert "does not exist" in refused("export", f"{factories}:small", *arguments)
    np.savez(tmp_path / "source.npz", pictures=GOOD[:, 0, 0])
    assert "pictures" in refused("export", f"{factories}:small", *arguments)


def test_an_archive_of_pickles_is_not_opened(refused, factories, tmp_path):
    np.savez(tmp_path / "source.npz", images=np.array([{"a": 1}], object))
    refused("export", f"{factories}:small", "--calibration", tmp_path / "source.npz", "--out", tmp_path / "out")


# Bundles -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [FULL, TRUNK, TAIL, SOURCE])
@pytest.mark.parametrize("command", ["check", "replay"])
def test_one_flipped_byte_is_noticed(name, command, refused, device_bundle, tmp_path):
    folder = copy_of(device_bundle, tmp_path)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    more = ["--data", tmp_path / "any.npz"] if command == "replay" else []
    shown = refused(command, folder, *more)
    assert f"{name} is damaged" in shown


@pytest.mark.parametrize("name", [FULL, TRUNK, TAIL, SOURCE, MANIFEST])
def test_a_missing_file_is_named(name, refused, device_bundle, tmp_path):
    folder = copy_of(device_bundle, tmp_path)
    (folder / name).unlink()
    assert name in refused("check", folder)


def test_a_manifest_that_is_damaged_is_named(refused, device_bundle, tmp_path):
    file = copy_of(device_bundle, tmp_path) / MANIFEST
    good = file.read_bytes()
    for broken in (good[: len(good) // 2], b"\xff" + good, b"[]", b"", b"null"):
        file.write_bytes(broken)
        assert MANIFEST in refused("info", file.parent)
    raw = json.loads(good)
    del raw["sites"][0]["channels"]
    file.write_text(json.dumps(raw))
    assert "sites.0.channels" in refused("check", file.parent)
    file.write_text(json.dumps({**json.loads(good), "surprise": 1}))
    assert "surprise" in refused("check", file.parent)


def test_a_manifest_whose_facts_were_changed_is_refused(refused, device_bundle, tmp_path):
    """The manifest has no hash of its own; a changed fact shows in the gate or in the files."""
    file = copy_of(device_bundle, tmp_path) / MANIFEST
    raw = json.loads(file.read_bytes())
    raw["sites"][0]["channels"] = 7
    file.write_text(json.dumps(raw))
    refused("check", file.parent)


def test_a_bundle_from_the_future_asks_for_an_upgrade(refused, device_bundle, tmp_path):
    file = copy_of(device_bundle, tmp_path) / MANIFEST
    raw = json.loads(file.read_bytes())
    file.write_text(json.dumps({**raw, "schema_version": 2, "unknown_thing": True}))
    for command in ("info", "check"):
        shown = refused(command, file.parent)
        assert "schema 2" in shown
        assert "upgrade" in shown


@pytest.mark.parametrize("command", ["info", "check"])
def test_a_folder_that_is_no_bundle_is_named(command, refused, tmp_path):
    assert "no bundle" in refused(command, tmp_path)
    assert "no bundle" in refused(command, tmp_path / "absent")


# Replay --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def archive(tmp_path, tiny_data):
    def write(**changes) -> Path:
        np.savez(tmp_path / "data.npz", **{"images": tiny_data.images, "labels": tiny_data.labels, **changes})
        return tmp_path / "data.npz"

    return write


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scenario", "continuall"], "did you mean continual"),
        (["--method", "momentss"], "did you mean moments"),
        (["--method", ","], "method"),
        (["--engine", "tensorrt9"], "tensorrt9"),
        (["--corruption", "fogg"], "did you mean fog"),
        (["--severity", "6"], "severity is 6"),
        (["--batch-size", "0"], "batch size is 0"),
        (["--limit", "0"], "limit is 0"),
    ],
)
def test_a_replay_of_something_unknown_is_refused(arguments, said, refused, archive, device_bundle):
    assert said in refused("replay", device_bundle.path, "--data", archive(), *arguments)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"labels": np.zeros(127, np.int64)}, "127"),
        ({"labels": np.full(128, 5)}, "5 outputs"),
        ({"labels": np.full(128, -1)}, "-1"),
        ({"labels": np.zeros(128, np.float32)}, "float32"),
        ({"labels": np.zeros((128, 5), np.int64)}, "(128, 5)"),
        ({"images": np.zeros((128, 17, 16, 3), np.uint8)}, "(17, 16, 3)"),
        ({"images": np.zeros((0, 16, 16, 3), np.uint8), "labels": np.zeros(0, np.int64)}, "no frame"),
        ({"images": np.full((128, 3, 16, 16), np.nan, np.float32)}, "NaN"),
    ],
    ids=["fewer", "too high", "negative", "floats", "one-hot", "size", "empty", "nan"],
)
def test_frames_and_labels_that_do_not_fit_are_refused(changes, said, refused, archive, device_bundle):
    path = archive(**changes)
    assert said in refused("replay", device_bundle.path, "--data", path, "--scenario", "natural")


def test_a_result_that_cannot_be_written_is_told(refused, archive, device_bundle, tmp_path):
    (tmp_path / "file").write_text("in the way")
    shown = refused(
        *("replay", device_bundle.path, "--data", archive(), "--scenario", "natural", "--method", "source"),
        *("--json", tmp_path / "file" / "results.json"),
    )
    assert "results.json" in shown


@pytest.mark.parametrize("arguments", [["export"], ["replay"], ["nonsense"], ["check", "--no-such-option", "x"]])
def test_wrong_arguments_are_told_without_a_traceback(arguments, capsys):
    assert run(arguments) == WRONG
    assert "Traceback" not in capsys.readouterr().err
