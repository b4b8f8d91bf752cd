"""What every registered part must keep to, on both kinds of bundle. A new one is tested by being registered.

The promises themselves are in `benchmarks/contract`, which `edge-adapt contract` holds other packages to.
"""

from __future__ import annotations

import pytest

from benchmarks import scenarios
from benchmarks.contract import methods, parts
from benchmarks.contract.run import subject_of
from benchmarks.contract.stand import Inapplicable, Promise, Stand
from edge_adapt.plugins import ENGINES, METHODS, ROUTERS, SCENARIOS, WRAPPERS, names


@pytest.fixture(scope="module", params=["device_bundle", "reference_bundle"])
def stand(request, tiny_data):
    made = Stand(request.getfixturevalue(request.param), tiny_data)
    yield made
    made.close()


@pytest.fixture(scope="module")
def on_device(device_bundle, tiny_data):
    made = Stand(device_bundle, tiny_data)
    yield made
    made.close()


def keeps(promise: Promise, stand: Stand, group: str, name: str) -> None:
    try:
        promise.check(stand, subject_of(group, name))
    except Inapplicable as reason:
        pytest.skip(f"{name} {reason}")


@pytest.mark.parametrize("promise", methods.PROMISES, ids=str)
@pytest.mark.parametrize("name", names(METHODS))
def test_a_method_keeps_its_promises(stand, name, promise):
    keeps(promise, stand, METHODS, name)


@pytest.mark.parametrize("promise", methods.PROMISES, ids=str)
@pytest.mark.parametrize(("group", "name"), [(group, name) for group in (WRAPPERS, ROUTERS) for name in names(group)])
def test_a_wrapper_keeps_the_promises_of_a_method(stand, group, name, promise):
    keeps(promise, stand, group, name)


@pytest.mark.parametrize("promise", parts.ENGINE_PROMISES, ids=str)
@pytest.mark.parametrize("name", names(ENGINES))
def test_an_engine_keeps_its_promises(stand, name, promise):
    keeps(promise, stand, ENGINES, name)


@pytest.mark.parametrize("promise", parts.SCENARIO_PROMISES, ids=str)
@pytest.mark.parametrize("name", scenarios.names())
def test_a_scenario_keeps_its_promises(on_device, name, promise):
    keeps(promise, on_device, SCENARIOS, name)
