"""What a bank takes, on a small network and cameras that nobody had before."""

from __future__ import annotations

import numpy as np

from benchmarks.bank import Plan, endless, new_domain, weighed


def test_over_ever_new_domains_the_bank_stays_within_its_cap(device_bundle, tiny_data):
    plan = Plan(frames=12 * 160, every=160, batch_size=16)
    row = endless(device_bundle, tiny_data.images, "moments", plan)
    assert row["domains"] == 12 and row["frames"] == 12 * 160
    assert row["founded"] > 8, "there were more domains than entries"
    assert row["entries"] <= 8
    assert row["bytes"] <= 8 * 40 * (device_bundle.channels + 1024)


def test_an_entry_of_a_method_that_only_sets_ports_is_small(device_bundle, tiny_data):
    made = weighed(device_bundle, tiny_data.images, ("moments", "tent"), Plan(every=160, batch_size=16))
    moments, tent = made["entries"]
    assert 0 < moments["bytes"] < tent["bytes"]
    assert moments["bytes"] <= 40 * device_bundle.channels + 8 * 1024


def test_no_two_domains_are_alike_and_each_is_one_change(tiny_data):
    rng = np.random.default_rng(0)
    first, second = new_domain(rng), new_domain(rng)
    images = tiny_data.images[:8]
    assert first(images).dtype == np.uint8 and first(images).shape == images.shape
    means = [[change(images).mean() for _ in range(2)] for change in (first, second)]
    assert np.ptp(means[0]) < 2 and np.ptp(means[1]) < 2
    assert abs(np.mean(means[0]) - np.mean(means[1])) > 4
