"""The default profile: built from the methods by name, for every kind of bundle."""

from __future__ import annotations

from edge_adapt.methods.auto import AUTO, choose
from edge_adapt.methods.catalogue import build
from edge_adapt.methods.protocol import Context


def test_auto_is_a_composition_that_can_be_asked_for_by_name(device_bundle):
    context = Context(device_bundle, lambda: None, 0)
    by_itself, by_name = build(AUTO, context), build(choose(device_bundle), context)
    assert type(by_itself) is type(by_name)
    assert by_itself.needs == by_name.needs
    assert by_itself.watches == by_name.watches


def test_auto_takes_wrappers_and_settings_as_others_do(device_bundle):
    wrapped = build(f"{AUTO}+lame", Context(device_bundle, lambda: None, 0, {"guards": False}))
    assert wrapped.name == "lame"


def test_a_network_without_norms_is_left_as_it_is(device_bundle):
    from dataclasses import replace

    bare = replace(device_bundle, manifest=device_bundle.manifest.model_copy(update={"sites": ()}))
    assert choose(bare).startswith("source")
