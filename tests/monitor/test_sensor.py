"""Sensor health: bad frames are found, good ones pass, and whatever passes can be fed to the network."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spent import spending

from edge_adapt.bundle import InputSpec
from edge_adapt.errors import DataError
from edge_adapt.monitor.sensor import FROZEN_AFTER, SensorCheck, fits
from edge_adapt.preprocess import Preprocess

COLOUR = InputSpec(shape=(3, 16, 16), scale=255.0, mean=(0.5, 0.4, 0.6), std=(0.25, 0.2, 0.3))
WINDOW = InputSpec(shape=(9, 128), layout="NCW", mean=(0.5,), std=(0.4,))
RAW = InputSpec(shape=(3, 16, 16))
LARGE = InputSpec(shape=(3, 224, 224), scale=255.0, mean=(0.5,), std=(0.25,), resize=(256, 224))
RNG = np.random.default_rng(0)


def image(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape or (16, 16, 3)).astype(np.uint8)


def test_good_frames_pass_in_every_form_that_the_network_takes():
    check = SensorCheck(COLOUR)
    for frame in (image(), image(3, 16, 16), image().astype(np.float32), image().astype(np.float64)):
        assert check.reason(frame) is None
    assert SensorCheck(WINDOW).reason(RNG.normal(0, 1, (9, 128)).astype(np.float32)) is None
    assert SensorCheck(InputSpec(shape=(1, 16, 16), scale=255.0, std=(0.3,))).reason(image(16, 16)) is None
    assert SensorCheck(LARGE).reason(image(480, 640, 3)) is None
    assert SensorCheck(RAW).reason(image()) is None  # a network that takes 0..255 as they are
    assert SensorCheck(RAW).reason(image().astype(np.float32) / 255) is None


def test_faint_contrast_is_no_constant_frame():
    faint = (128 + 0.05 * (image().astype(float) - 128)).astype(np.uint8)  # the strongest loss of contrast there is
    assert SensorCheck(COLOUR).reason(faint) is None


@pytest.mark.parametrize(
    ("spec", "frame", "reason"),
    [
        (COLOUR, image(16, 16), "shape"),
        (COLOUR, image(15, 16, 3), "shape"),
        (COLOUR, image(16, 16, 4), "shape"),
        (COLOUR, np.zeros((), np.uint8), "shape"),
        (COLOUR, np.zeros((0, 0, 3), np.uint8), "shape"),
        (LARGE, image(1, 2000, 3), "shape"),
        (LARGE, image(480, 640, 3).astype(np.float32), "shape"),
        (WINDOW, RNG.normal(0, 1, (128, 9)), "shape"),
        (COLOUR, image().astype(np.int32), "dtype"),
        (COLOUR, image() > 100, "dtype"),
        (COLOUR, image().astype(np.complex64), "dtype"),
        (COLOUR, image().astype(str), "dtype"),
        (COLOUR, image().astype(np.float32) / 255, "dtype"),
        (WINDOW, image(9, 128), "dtype"),
        (COLOUR, np.where(image() > 254, np.nan, 1.0), "nan"),
        (COLOUR, np.where(image() > 254, np.inf, 1.0).astype(np.float32), "nan"),
        (COLOUR, image() * 1e300, "nan"),
        (COLOUR, np.zeros((16, 16, 3), np.uint8), "constant"),
        (COLOUR, np.full((16, 16, 3), 255, np.uint8), "constant"),
        (COLOUR, np.broadcast_to(np.array([0, 0, 255], np.uint8), (16, 16, 3)), "constant"),
        (COLOUR, np.zeros((3, 16, 16), np.float32), "constant"),
        (WINDOW, np.repeat(np.arange(9.0)[:, None], 128, axis=1), "constant"),
        (RAW, np.full((16, 16, 3), 128, np.uint8), "constant"),
    ],
)
def test_a_bad_frame_has_its_reason(spec, frame, reason):
    assert SensorCheck(spec).reason(frame) == reason


def test_identical_frames_in_a_row_are_a_frozen_sensor_until_one_differs():
    check, still = SensorCheck(COLOUR), image()
    assert [check.reason(still.copy()) for _ in range(FROZEN_AFTER + 3)] == [None] * (FROZEN_AFTER - 1) + ["frozen"] * 4
    other = still.copy()
    other[7, 7, 1] ^= 1
    assert check.reason(other) is None and check.reason(still) is None


def test_how_many_is_a_setting_and_frames_that_take_turns_are_not_frozen():
    assert [SensorCheck(COLOUR, frozen_after=1).reason(image())] == ["frozen"]
    check, frames = SensorCheck(COLOUR, frozen_after=2), (image(), image())
    assert {check.reason(frames[index % 2]) for index in range(20)} == {None}


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(
        [COLOUR, WINDOW, RAW, LARGE, InputSpec(shape=(1, 8, 8)), InputSpec(shape=(8, 8, 3), layout="NHWC")]
    ),
    st.lists(st.sampled_from([0, 1, 2, 3, 8, 9, 16, 128, 224, 256]), max_size=4).map(tuple),
    st.sampled_from([np.uint8, np.float32]),
)
def test_every_shape_that_fits_can_be_preprocessed_and_the_others_are_refused_there_too(spec, shape, dtype):
    frame = np.zeros(shape, dtype)
    if fits(spec, frame):
        assert Preprocess(spec)(frame[None]).shape == (1, *spec.shape)
    elif shape and min(shape) > 0 and spec.resize is None:
        with pytest.raises(DataError):
            Preprocess(spec)(frame[None])


def test_frames_are_left_alone_and_a_check_is_cheap():
    check = SensorCheck(LARGE)
    frames = [image(720, 1280, 3) for _ in range(4)]
    for frame in frames:
        frame.flags.writeable = False
    check.reason(frames[0])
    with spending() as spent:
        for index in range(20):
            check.reason(frames[index % 4])
    assert spent.cpu_s / 20 < 0.02
