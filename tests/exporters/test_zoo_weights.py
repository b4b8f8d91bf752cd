"""Weights files: what loads, and how files that are damaged, foreign, or another model's are refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from edge_adapt.errors import ArtifactError
from exporters.zoo import get, load_weights


@pytest.fixture
def model() -> nn.Module:
    return get("mlperf-kws").factory()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value + 1 for name, value in model.state_dict().items()}


def assert_refused(model: nn.Module, path: Path, match: str) -> None:
    """Loading raises ArtifactError with that text, and the module keeps every weight."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ArtifactError, match=match):
        load_weights(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".th", ".pt"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_load_from_every_format(model, tmp_path, suffix, prefix):
    wanted = weights_of(model)
    path = tmp_path / f"weights{suffix}"
    stored = {prefix + name: value for name, value in wanted.items()}
    if suffix == ".safetensors":
        save_file(stored, path)
    else:
        torch.save({"state_dict": stored, "best_prec1": 92.0} if suffix == ".th" else stored, path)
    load_weights(model, str(path))
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


def test_step_counters_may_be_absent(model, tmp_path):
    stored = {name: value for name, value in weights_of(model).items() if "num_batches" not in name}
    save_file(stored, tmp_path / "w.safetensors")
    load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model.state_dict()["fc.weight"], stored["fc.weight"])


def test_a_mismatch_names_counts_and_the_first_three_keys(model, tmp_path):
    stored = weights_of(model)
    for name in ("bn0.weight", "bn0.bias", "block1.dw.weight", "block1.dw.bias"):
        del stored[name]
    stored["extra.weight"] = torch.zeros(1)
    stored["fc.weight"] = torch.zeros(35, 64)
    save_file(stored, tmp_path / "w.safetensors")
    assert_refused(
        model, tmp_path / "w.safetensors", r"4 missing \(bn0.weight, bn0.bias, block1.dw.weight, \."
    )
    assert_refused(model, tmp_path / "w.safetensors", r"1 unexpected \(extra.weight\)")
    assert_refused(model, tmp_path / "w.safetensors", r"fc.weight is \[35, 64\], expected \[12, 64\]")
    assert_refused(model, tmp_path / "w.safetensors", "the model has 65 tensors, the file 62")


def test_integer_weights_are_refused_not_rounded(model, tmp_path):
    stored = weights_of(model)
    stored["fc.weight"] = torch.zeros(12, 64, dtype=torch.int8)
    save_file(stored, tmp_path / "w.safetensors")
    assert_refused(model, tmp_path / "w.safetensors", r"fc.weight is int8 \[12, 64\], expected \[12, 64\]")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: b"not a weights file",
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:-1],
        lambda raw: bytes(200) + raw[200:],
    ],
    ids=["empty", "text", "half", "one byte short", "header wiped"],
)
def test_a_damaged_file_is_refused(
    model: nn.Module, tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(weights_of(model), path)
    path.write_bytes(damage(path.read_bytes()))
    assert_refused(model, path, f"weights{suffix} cannot be read")


class Payload:
    """Runs a function of the author's choice when it is unpickled without care."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_code_in_a_pickle_is_not_run(model, tmp_path):
    torch.save({"fc.weight": Payload(tmp_path / "ran")}, tmp_path / "w.pth")
    assert_refused(model, tmp_path / "w.pth", "cannot be read")
    assert not (tmp_path / "ran").exists()


def test_what_is_no_state_dict_is_refused(model, tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    assert_refused(model, tmp_path / "list.pth", "list that is not a state dict")
    torch.save({"epoch": 3, "model": weights_of(model)}, tmp_path / "nested.pth")
    assert_refused(model, tmp_path / "nested.pth", "dict that is not a state dict")
    torch.save({}, tmp_path / "nothing.pth")
    assert_refused(model, tmp_path / "nothing.pth", "56 missing")
    (tmp_path / "weights.h5").write_bytes(b"HDF")
    assert_refused(model, tmp_path / "weights.h5", "unknown suffix '.h5'")
    assert_refused(model, tmp_path / "absent.pth", "absent.pth is not a file")
    assert_refused(model, tmp_path, "is not a file")


@pytest.mark.parametrize("file", ["cifar10_resnet20", "cifar10_resnet56", "kws_dscnn"])
def test_the_weights_of_another_model_do_not_load(shared_data, file):
    path = shared_data / "models" / f"{file}.safetensors"
    assert_refused(get("cifar-resnet44").factory(), path, "does not fit CifarResNet")
