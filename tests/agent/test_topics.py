"""The topic tree: depth is fixed, foreign topics are none of ours."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agents.topics import Place, Topics
from edge_adapt.errors import ConfigError

TOPICS = Topics("ea/v1", "lab", "dev1", ("all", "north"))


def test_every_topic_of_the_tree():
    root = "ea/v1/lab/dev1"
    built = {
        TOPICS.state: Place("state"),
        TOPICS.birth: Place("birth"),
        TOPICS.reported: Place("reported"),
        TOPICS.desired: Place("desired"),
        TOPICS.tele("perf"): Place("tele", ("perf",)),
        TOPICS.event("drift"): Place("event", ("drift",)),
        TOPICS.alert("disk"): Place("alert", ("disk",)),
        TOPICS.cmd("ping"): Place("cmd", ("ping",)),
        TOPICS.ack("01ABC"): Place("ack", ("01ABC",)),
        TOPICS.xfer("up1", 7): Place("xfer", ("up1", "7")),
    }
    assert all(topic.startswith(f"{root}/") for topic in built)
    assert {topic: TOPICS.parse(topic) for topic in built} == built


def test_it_listens_to_itself_and_its_groups():
    assert TOPICS.subscriptions == [
        "ea/v1/lab/dev1/desired",
        "ea/v1/lab/dev1/cmd/+",
        "ea/v1/lab/dev1/xfer/+/+",
        "ea/v1/lab/_group/all/cmd/+",
        "ea/v1/lab/_group/north/cmd/+",
    ]
    assert TOPICS.parse("ea/v1/lab/_group/all/cmd/ping") == Place("cmd", ("ping",), "all")


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "ea/v1/lab",
        "ea/v1/lab/dev1",
        "ea/v1/lab/dev2/cmd/ping",
        "ea/v1/hall/dev1/cmd/ping",
        "ea/v2/lab/dev1/cmd/ping",
        "ea/v1/lab/dev1/cmd",
        "ea/v1/lab/dev1/cmd/",
        "ea/v1/lab/dev1/cmd/..",
        "ea/v1/lab/dev1/cmd/a/b",
        "ea/v1/lab/dev1/cmd/a b",
        "ea/v1/lab/dev1/xfer/a/x",
        "ea/v1/lab/dev1/xfer/a/-1",
        "ea/v1/lab/_group/south/cmd/ping",
        "ea/v1/lab/_group/all/desired",
        "ea/v1/lab/_ctrl/boss/state",
        "$SYS/broker/version",
    ],
)
def test_what_is_not_ours_is_nothing(topic):
    assert TOPICS.parse(topic) is None


@given(st.text(max_size=30))
def test_any_text_can_be_parsed(text):
    TOPICS.parse(text)
    TOPICS.parse(f"{TOPICS.root}/{text}")


@pytest.mark.parametrize("name", ["", "a/b", "+", "#", "ä", "..", "x" * 65, "a\n"])
def test_a_level_that_is_none_is_refused(name):
    with pytest.raises(ConfigError, match="level of a topic"):
        TOPICS.event(name)
    with pytest.raises(ConfigError, match="level of a topic"):
        Topics("ea/v1", "lab", name)
