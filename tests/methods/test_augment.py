"""CoTTA's views: the units, the colour arithmetic against the standard library, the geometry, and the randomness."""

from __future__ import annotations

import colorsys

import pytest
import torch

from edge_adapt.bundle import InputSpec
from edge_adapt.errors import ConfigError
from edge_adapt.methods import augment
from edge_adapt.methods.augment import Augment, view

SPECS = {
    "normalised by 255": InputSpec(shape=(3, 8, 8), scale=255.0, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)),
    "raw, 0 to 255": InputSpec(shape=(3, 8, 8), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
    "grey": InputSpec(shape=(1, 8, 8), scale=255.0, mean=(0.5,), std=(0.25,)),
    "channels last": InputSpec(shape=(8, 8, 3), layout="NHWC", scale=127.5, mean=(1.0,) * 3, std=(1.0,) * 3),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(channels: int = 3, size: int = 8, count: int = 4) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=generator(7))


@pytest.mark.parametrize("name", SPECS)
def test_normalisation_is_undone_and_redone(name):
    spec = SPECS[name]
    unit = images(spec.channels)
    frames = Augment(spec).fed(unit)
    assert tuple(frames.shape[1:]) == spec.shape
    torch.testing.assert_close(Augment(spec).unit(frames), unit, atol=1e-6, rtol=0)


def test_a_raw_255_is_one():
    spec = SPECS["normalised by 255"]
    white = (torch.ones(1, 3, 8, 8) - torch.tensor(spec.mean).reshape(3, 1, 1)) / torch.tensor(
        spec.std
    ).reshape(3, 1, 1)
    torch.testing.assert_close(Augment(spec).unit(white), torch.ones(1, 3, 8, 8))
    torch.testing.assert_close(
        Augment(SPECS["raw, 0 to 255"]).unit(torch.full((1, 3, 8, 8), 255.0)), torch.ones(1, 3, 8, 8)
    )


@pytest.mark.parametrize("name", SPECS)
def test_views_keep_shape_and_range_and_leave_the_input_alone(name):
    spec = SPECS[name]
    change = Augment(spec)
    frames = change.fed(images(spec.channels))
    before = frames.clone()
    for seed in range(20):
        made = change(frames, generator(seed))
        unit = change.unit(made)
        assert made.shape == frames.shape
        assert torch.isfinite(made).all()
        assert float(unit.min()) >= -1e-5
        assert float(unit.max()) <= 1 + 1e-5
    assert torch.equal(frames, before)


def test_the_generator_decides_everything():
    first, again, other = (view(images(), generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_one_draw_holds_for_the_whole_batch(monkeypatch):
    monkeypatch.setattr(augment, "NOISE", 0.0)
    same = images(count=1).repeat(3, 1, 1, 1)
    made = view(same, generator(3))
    torch.testing.assert_close(made[1:], made[:1].repeat(2, 1, 1, 1))


def test_black_frames_stay_finite():
    for seed in range(10):
        assert torch.isfinite(view(torch.zeros(2, 3, 8, 8), generator(seed))).all()


@pytest.mark.parametrize("turn", [-0.06, 0.0, 0.06, 0.5])
def test_hue_is_the_hsv_turn_of_the_standard_library(turn):
    made = augment.hue(images(count=1, size=4), turn)[0].flatten(1).T
    for colour, expected in zip(made, images(count=1, size=4)[0].flatten(1).T, strict=True):
        h, s, v = colorsys.rgb_to_hsv(*expected.tolist())
        assert colour.tolist() == pytest.approx(colorsys.hsv_to_rgb((h + turn) % 1, s, v), abs=1e-5)


def test_hue_and_saturation_leave_grey_images_alone():
    grey = images(channels=1)
    assert augment.hue(grey, 0.05) is grey
    assert augment.saturation(grey, 1.4) is grey
    colour = grey.repeat(1, 3, 1, 1)
    torch.testing.assert_close(augment.hue(colour, 0.05), colour)
    torch.testing.assert_close(augment.saturation(colour, 1.4), colour)


def test_a_factor_of_one_changes_no_colour():
    for change in (augment.brightness, augment.contrast, augment.saturation, augment.gamma):
        torch.testing.assert_close(change(images(), 1.0), images())


def test_the_colour_changes_do_what_they_are_called():
    x = 0.5 * images()
    torch.testing.assert_close(augment.brightness(x, 1.4), 1.4 * x)
    torch.testing.assert_close(augment.gamma(x, 1.3), x**1.3)
    luma = (x * torch.tensor([0.299, 0.587, 0.114]).reshape(1, 3, 1, 1)).sum(1)
    torch.testing.assert_close(augment.contrast(x, 0.0)[:, 0, 0, 0], luma.mean((1, 2)))
    torch.testing.assert_close(augment.saturation(x, 0.0)[:, 0], luma)


def still(monkeypatch, **changes):
    """No rotation, zoom or shift but what is asked for."""
    for name, value in {"DEGREES": (0.0, 0.0), "ZOOM": (1.0, 1.0), "SHIFT": 0.0, **changes}.items():
        monkeypatch.setattr(augment, name, value)


def test_without_movement_the_warp_is_the_identity_with_replicated_edges(monkeypatch):
    still(monkeypatch)
    expected = torch.nn.functional.pad(images(), (2, 2, 2, 2), mode="replicate")
    torch.testing.assert_close(augment.warp(images(), generator(), margin=2), expected, atol=1e-5, rtol=0)


def test_a_quarter_turn_and_a_zoom(monkeypatch):
    still(monkeypatch, DEGREES=(90.0, 90.0))
    made = augment.warp(images(), generator(), margin=0)
    turned = [torch.rot90(images(), times, (2, 3)) for times in (1, 3)]
    assert min(float((made - other).abs().max()) for other in turned) < 1e-5
    still(monkeypatch, ZOOM=(2.0, 2.0))
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    row = augment.warp(ramp, generator(), margin=0)[0, 0, 4]
    torch.testing.assert_close(row.diff(), torch.full((7,), 0.5))


def test_the_warp_is_that_of_a_canvas_of_twice_the_size(monkeypatch):
    """Clamped coordinates equal a replicated border of n/2 at the published limits, in the far corners too."""
    x = images(size=16)
    for angle in (-15.0, 15.0):
        still(monkeypatch, DEGREES=(angle, angle), ZOOM=(0.9, 0.9))
        direct = augment.warp(x, generator(), margin=0)
        canvas = torch.nn.functional.pad(x, (8, 8, 8, 8), mode="replicate")
        kept = augment.warp(canvas, generator(), margin=0)[..., 8:-8, 8:-8]
        torch.testing.assert_close(direct, kept, atol=1e-5, rtol=0)


def test_the_blur_keeps_brightness_and_a_tiny_sigma_changes_nothing():
    padded = torch.nn.functional.pad(images(), (2, 2, 2, 2), mode="replicate")
    torch.testing.assert_close(augment.blur(padded, 0.001), images())
    flat = torch.full((1, 3, 12, 12), 0.3)
    torch.testing.assert_close(augment.blur(flat, 0.5), torch.full((1, 3, 8, 8), 0.3))
    assert augment.blur(padded, 0.5).std() < images().std()


@pytest.mark.parametrize(
    "spec",
    [InputSpec(shape=(40, 100), layout="NCW"), InputSpec(shape=(2, 8, 8), mean=(0.0, 0.0), std=(1.0, 1.0))],
)
def test_what_is_no_image_is_refused(spec):
    with pytest.raises(ConfigError, match=r"no image[\s\S]*tent"):
        Augment(spec)
