"""Parts of other people's packages: found, refused with a sentence where they are broken, and no burden to others."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from benchmarks import scenarios
from benchmarks.contract import run as contract
from benchmarks.contract.stand import Inapplicable, Promise
from device_agents.settings import SourceSettings
from edge_adapt import plugins
from edge_adapt.cli import run
from edge_adapt.errors import ConfigError, EngineError
from edge_adapt.methods.catalogue import fitting
from edge_adapt.streams.data import load_data
from edge_adapt.streams.live import SourceEnded, open_source

SOUND = '''
from edge_adapt.methods.source import Source
class Mine(Source):
    name = "mine"
class Number:
    """Not a method."""
    name = "number"
class Renamed(Source):
    name = "another"
class Stolen(Source):
    name = "source"
'''
SHOWER = '''
import numpy as np
from edge_adapt.streams.live.protocol import BrokenFrameError, Frame, SourceEnded
class Shower:
    """Frames 0 to 9, of which the sixth is broken."""
    paced, example = False, "10"
    def __init__(self, place, *, channels=3, loop=False):
        self.count, self.number = int(place), 0
    def open(self):
        self.at = 0
    def read(self, timeout_s):
        if self.at >= self.count:
            raise SourceEnded
        self.at, self.number = self.at + 1, self.number + 1
        if self.at == 6:
            raise BrokenFrameError("torn", remedy="none")
        return Frame(self.number - 1, 0.0, np.full((8, 8, 3), self.at, np.uint8), "f")
    def close(self):
        pass
'''


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Make a package known, as pip would leave it: modules, and a dist-info with entry points."""
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins._tell_once.cache_clear()

    def make(name: str, points: dict[str, dict[str, str]], **modules: str) -> None:
        folder = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        for group, many in points.items():
            lines = [f"[{group}]", *(f"{key} = {place}" for key, place in many.items())]
            (folder / "entry_points.txt").write_text("\n".join(lines))
        for module, text in modules.items():
            (tmp_path / f"{module}.py").write_text(text)
            monkeypatch.delitem(sys.modules, module, raising=False)

    return make


def test_a_method_of_another_package_is_found_and_offered(install, device_bundle):
    install("pack-a", {plugins.METHODS: {"mine": "pack_a:Mine"}}, pack_a=SOUND)
    assert plugins.find(plugins.METHODS, "mine").name == "mine"
    assert "mine" in fitting(device_bundle)
    assert [(group, point.name) for group, point in plugins.of_package("Pack_A")] == [(plugins.METHODS, "mine")]


@pytest.mark.parametrize(
    ("place", "error", "says"),
    [
        ("no_such_module:Mine", EngineError, "needs a library that is missing: No module named 'no_such_module'"),
        ("pack_a:Nothing", EngineError, "cannot be loaded: AttributeError"),
        ("torn:Mine", EngineError, "cannot be loaded: ZeroDivisionError"),
        ("wrong:Mine", EngineError, "cannot be loaded: SyntaxError"),
        ("pack_a:Number", ConfigError, "has no requires, init, look"),
        ("pack_a:SOUND", EngineError, "cannot be loaded"),
        ("pack_a:Renamed", ConfigError, "calls itself 'another'"),
        ("json:dumps", ConfigError, "expected a class"),
    ],
)
def test_a_broken_method_is_one_sentence_and_others_go_on(install, device_bundle, caplog, place, error, says):
    install(
        "pack-a",
        {plugins.METHODS: {"mine": "pack_a:Mine", "number": place}},
        *(),
        pack_a=SOUND,
        torn="1 / 0",
        wrong="def",
    )
    with pytest.raises(error, match="method 'number' of package pack-a") as caught:
        plugins.find(plugins.METHODS, "number")
    assert says in caught.value.what
    assert "pack-a" in caught.value.remedy or "correct" in caught.value.remedy
    offered = fitting(device_bundle)
    assert "mine" in offered and "moments" in offered and "number" not in offered
    assert fitting(device_bundle) == offered
    assert len([record for record in caplog.records if "'number'" in record.message]) == 1


def test_a_name_of_ours_cannot_be_taken(install, caplog):
    install("pack-a", {plugins.METHODS: {"source": "pack_a:Stolen"}}, pack_a=SOUND)
    assert plugins.find(plugins.METHODS, "source").__module__ == "edge_adapt.methods.source"
    assert "method 'source' of package pack-a is not used" in caplog.text


def test_of_two_packages_with_one_name_neither_is_used(install, device_bundle):
    install("pack-a", {plugins.METHODS: {"mine": "pack_a:Mine"}}, pack_a=SOUND)
    install("pack-b", {plugins.METHODS: {"mine": "pack_b:Mine"}}, pack_b=SOUND)
    with pytest.raises(ConfigError, match="'mine' is claimed by the packages pack-a and pack-b"):
        plugins.find(plugins.METHODS, "mine")
    assert "mine" not in fitting(device_bundle)
    assert "moments" in fitting(device_bundle)


def test_a_scenario_has_to_be_one_and_cannot_take_an_id_of_ours(install):
    text = "from benchmarks.scenarios import Scenario\nfrom types import SimpleNamespace\n"
    text += "MINE = Scenario('mine', 'x', lambda *given: iter(()))\nOURS = Scenario('continual', 'x', None)\n"
    text += "LIKE = SimpleNamespace(name='like', summary='', shifts=None, play=None)\n"
    points = {"mine": "pack_a:MINE", "continual": "pack_a:OURS", "like": "pack_a:LIKE"}
    install("pack-a", {plugins.SCENARIOS: points}, pack_a=text)
    assert scenarios.get("mine").summary == "x"
    assert "mine" in scenarios.names()
    assert scenarios.get("continual") is scenarios.SCENARIOS["continual"]
    with pytest.raises(ConfigError, match="'like' is a SimpleNamespace"):
        scenarios.get("like")
    with pytest.raises(ConfigError, match="there is no scenario 'mien'") as caught:
        scenarios.get("mien")
    assert "mine" in caught.value.remedy


def test_a_source_is_played_to_its_end_as_data(install):
    install("pack-a", {plugins.SOURCES: {"shower": "pack_a:Shower"}}, pack_a=SHOWER)
    data = load_data("shower:10")
    assert data.images[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5, 7, 8, 9, 10]
    assert data.ordered and data.gaps == (5,) and data.labels is None
    assert [len(shift.images) for shift in scenarios.get("real").play(data, 5, 0)] == [5, 4]
    assert len(load_data("shower:10", limit=3)) == 3


def test_a_command_that_cannot_be_loaded_breaks_no_other(install, capsys):
    install("pack-a", {plugins.COMMANDS: {"mine": "no_such_module:run"}})
    assert run(["--help"]) == 0
    assert "replay" in capsys.readouterr().out
    assert run(["mine"]) == 2
    assert "command 'mine' of package pack-a needs a library" in capsys.readouterr().err


def test_the_contract_tells_what_is_broken_and_goes_on(install, tmp_path, capsys):
    """One that takes any setting, one that keeps all frames, one that cannot be imported, one whose name is taken."""
    text = SOUND + (
        "class Hoard(Source):\n"
        "    name = 'hoard'\n"
        "    def init(self):\n"
        "        return []\n"
        "    def look(self, state, frames, passed):\n"
        "        return frames\n"
        "    def step(self, state, seen):\n"
        "        from edge_adapt.methods.protocol import Step\n"
        "        state.append(seen.frames)\n"
        "        return Step(state)\n"
    )
    points = {"mine": "pack_a:Mine", "hoard": "pack_a:Hoard", "gone": "pack_a:Gone", "tent": "pack_a:Mine"}
    install("pack-a", {plugins.METHODS: points}, pack_a=text)
    assert run(["contract", "pack-a", "--json", str(tmp_path / "verdicts.json")]) == 1
    out = capsys.readouterr().out
    verdicts = json.loads((tmp_path / "verdicts.json").read_text())["verdicts"]
    found = [verdict for verdict in verdicts if verdict["status"] == "broken"]
    broken = {(verdict["name"], verdict["promise"]): verdict["why"] for verdict in found}
    assert "step() changes the state" in broken["hoard", "a step is pure"]
    assert "the state grew" in broken["hoard", "a state does not grow"]
    assert "AttributeError" in broken["gone", contract.LOADS]
    assert "the package edge-adapt has a method of that name" in broken["tent", contract.LOADS]
    assert {name for name, _ in broken} == {"hoard", "gone", "tent", "mine"}
    assert [promise for name, promise in broken if name == "mine"] == ["unknown settings are refused"]
    assert f"{len(broken)} broken" in out
    skipped = {(each["name"], each["promise"]): each["why"] for each in verdicts if each["status"] == "skipped"}
    assert skipped["mine", "a compact state goes on"] == "keeps the whole of its state"


def test_a_skip_names_the_mode_where_that_is_the_reason():
    """`device` and `reference` are tried; what holds in both is said once."""

    def why(reasons):
        def check(stand, subject):
            if stand.mode in reasons:
                raise Inapplicable(reasons[stand.mode])

        both = [SimpleNamespace(mode="device"), SimpleNamespace(mode="reference")]
        return contract._verdict(plugins.METHODS, "mine", Promise("is asked", check), None, both)

    assert why({"device": "no", "reference": "no"}).why == "no"
    assert why({"device": "no", "reference": "never"}).why == "device mode: no; reference mode: never"
    assert why({"device": "no"}).status == "kept"


def test_a_package_without_parts_is_refused_with_the_nearest(capsys):
    assert run(["contract", "edge-adpat"]) == 2
    assert "did you mean edge-adapt" in capsys.readouterr().err


def test_an_agent_may_be_given_a_source_of_another_package(install):
    install("pack-a", {plugins.SOURCES: {"shower": "pack_a:Shower"}}, pack_a=SHOWER)
    settings = SourceSettings(kind="shower", place="3")
    source = open_source(settings.kind, place=settings.place, channels=1)
    source.open()
    assert [source.read(1).number for _ in range(3)] == [0, 1, 2]
    with pytest.raises(SourceEnded):
        source.read(1)
    with pytest.raises(ValidationError, match="needs `place`"):
        SourceSettings(kind="shower")
    with pytest.raises(ValidationError, match="there is no source 'showre'; did you mean shower"):
        SourceSettings(kind="showre", place="3")
    with pytest.raises(ConfigError, match="no source of kind 'showre'"):
        open_source("showre", place="3")
