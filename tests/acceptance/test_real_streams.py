"""What holds on real streams: people, digits of another office, paintings and cartoons, keywords."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.replay import Replay, replay
from edge_adapt.bundle import Bundle
from edge_adapt.streams.data import load_data
from exporters.export import export, from_spec
from exporters.head import with_head

pytestmark = pytest.mark.slow

HAR_MEAN = (-0.000636, -0.000292, -0.000275, 0.000506, -0.000824, 0.000113, 0.804749, 0.028755, 0.086498)
HAR_STD = (0.194846, 0.122427, 0.106879, 0.406815, 0.381854, 0.255743, 0.414112, 0.390995, 0.357769)
SMALL_BATCHES = pytest.mark.parametrize("batch_size", [1, 32])


def errors(bundle: Bundle, data: str, methods: tuple[str, ...], **plan: Any) -> dict[str, dict[str, float]]:
    """Method -> shift -> error in per cent."""
    results = replay(bundle, load_data(data), Replay(scenario="natural", methods=methods, **plan))
    return {row["method"]: row["errors"] for row in results["rows"]}


@pytest.fixture(scope="module")
def har(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = from_spec(
        str(shared_data / "models" / "uci_har_cnn.onnx"), weights=None, fed=(1.0, HAR_MEAN, HAR_STD)
    )
    source = load_data(f"har-source:{shared_data / 'uci_har_stream.npz'}")
    return Bundle.load(export(model, tmp_path_factory.mktemp("real") / "har", calibration=source.images))


@pytest.fixture(scope="module")
def digits(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = from_spec(str(shared_data / "models" / "mnist_cnn.onnx"), weights=None)
    source = load_data(f"usps-source:{shared_data / 'digits_mnist_usps_test.npz'}")
    return Bundle.load(export(model, tmp_path_factory.mktemp("real") / "mnist", calibration=source.images))


def test_har_has_the_published_errors(har: Bundle, shared_data: Path) -> None:
    found = errors(har, f"har:{shared_data / 'uci_har_stream.npz'}", ("source",))["source"]
    expected = {2: 7.9, 9: 27.4, 12: 5.0, 18: 0.5, 24: 1.8}
    assert found == {f"subject-{person}": pytest.approx(error, abs=0.1) for person, error in expected.items()}


@SMALL_BATCHES
def test_people_who_do_one_thing_for_minutes_are_no_change_of_domain(
    har: Bundle, shared_data: Path, batch_size: int
) -> None:
    """Without class statistics, moments make one activity look like another source: 54 to 57 % error."""
    found = errors(har, f"har:{shared_data / 'uci_har_stream.npz'}", ("source", "moments"), batch_size=batch_size)
    mean = {method: sum(of.values()) / len(of) for method, of in found.items()}
    assert mean["moments"] <= mean["source"] + 0.5
    assert found["moments"]["subject-2"] <= found["source"]["subject-2"] - 3.0


def test_a_foreign_net_with_a_fixed_batch_runs_at_any(digits: Bundle, shared_data: Path) -> None:
    data = f"usps:{shared_data / 'digits_mnist_usps_test.npz'}"
    one, many = (errors(digits, data, ("source",), batch_size=size)["source"] for size in (1, 64))
    assert one == many
    assert one == {"mnist": pytest.approx(1.6, abs=0.1), "usps": pytest.approx(20.7, abs=0.2)}


@SMALL_BATCHES
def test_digits_are_not_harmed_by_moments(digits: Bundle, shared_data: Path, batch_size: int) -> None:
    """Digits that fill the frame are no shift of any channel's moments."""
    data = f"usps:{shared_data / 'digits_mnist_usps_test.npz'}"
    found = errors(digits, data, ("source", "moments"), batch_size=batch_size)
    assert found["moments"]["mnist"] <= found["source"]["mnist"] + 0.5
    assert found["moments"]["usps"] <= found["source"]["usps"] + 1.0


def test_digits_of_another_office_gain_by_shifted_features(digits: Bundle, shared_data: Path) -> None:
    data = f"usps:{shared_data / 'digits_mnist_usps_test.npz'}"
    found = errors(digits, data, ("source", "source+foa_shift"), batch_size=32)
    assert found["source+foa_shift"]["mnist"] <= found["source"]["mnist"] + 0.5
    assert found["source+foa_shift"]["usps"] <= found["source"]["usps"] - 3.0


@SMALL_BATCHES
def test_keywords_are_not_harmed(shared_data: Path, tmp_path: Path, batch_size: int) -> None:
    model = from_spec("zoo:mlperf-kws", weights=shared_data / "models" / "kws_dscnn.safetensors")
    file = shared_data / "speech_commands_kws01_mfcc.npz"
    bundle = Bundle.load(export(model, tmp_path / "kws", calibration=load_data(f"kws-source:{file}").images))
    found = errors(bundle, f"kws:{file}", ("source", "moments"), batch_size=batch_size)
    assert found["moments"]["kws"] <= found["source"]["kws"] + 0.5


def test_paintings_and_cartoons_gain(shared_data: Path, tmp_path: Path) -> None:
    source = load_data(f"pacs-source:{shared_data / 'pacs'}")
    model = with_head(from_spec("zoo:efficientnet-lite0", weights=None), source, None)
    bundle = Bundle.load(export(model, tmp_path / "pacs", calibration=source.images))
    found = errors(bundle, f"pacs:{shared_data / 'pacs'}", ("source", "moments"), batch_size=32, limit=200)
    assert found["source"]["photo"] <= 2.0
    assert found["moments"]["photo"] <= found["source"]["photo"] + 1.0  # one photo of 105
    assert found["moments"]["art_painting"] <= found["source"]["art_painting"] - 3.0
    assert found["moments"]["cartoon"] <= found["source"]["cartoon"] - 15.0
