"""An agent with a router: each domain has its own state, the board says which, and a restart keeps them."""

from __future__ import annotations

import numpy as np
import pytest
from agents import command, running, settings, stream, until

from device_agents.agent import Agent
from edge_adapt.errors import ConfigError

__all__ = ["running", "settings", "stream"]

ROUTED = {"name": "moments", "router": {"window": 8, "patience": 1}}


@pytest.fixture
def seasons(tiny_data, tmp_path):
    """Images as they are, and as dark ones, in turn: 128 of each."""
    path = tmp_path / "seasons.npz"
    dark = (tiny_data.images * 0.25).astype(np.uint8)
    np.savez(path, images=np.concatenate([tiny_data.images, dark]))
    return {"path": path}


def entries(agent):
    return [entry.name for entry in agent.core.learned.state.own.bank.entries]


def test_it_finds_the_domains_says_which_answers_and_keeps_them(running, settings, seasons):
    agent = running(method=ROUTED, source=seasons, budget={"learn_ms_per_s": 1e6})
    routes = set()
    until(lambda: routes.add(agent.board.status.route) or {"source", "domain-1"} <= routes)
    told = [event for event in agent.board.events() if event.text == "route: domain-1"]
    assert told and told[0].kind == "drift" and told[0].severity == "info"
    assert command(agent, "freeze", on=True)["status"] == "done"
    kept = entries(agent)
    agent.stopping.set()
    until(lambda: agent.board.status.state == "offline")
    again = Agent(settings(method=ROUTED, source=seasons))
    again.keeper.begin()
    assert entries(again) == kept
    again.intake.start()
    again.stop()


def test_without_a_router_there_is_no_route(running):
    agent = running()
    until(lambda: agent.board.status.learn["steps"] > 2)
    assert agent.board.status.route is None


def test_what_fills_an_event_name_does_not_fill_the_counts(running, seasons):
    agent = running(method=ROUTED, source=seasons)
    for number in range(30):
        agent._method_told(f"route: domain-{number}")
    assert agent.lookout.guards["route"] >= 30
    assert not [name for name in agent.lookout.guards if name.startswith("route:")]


def test_a_router_that_is_none_or_cannot_serve_is_refused_before_the_first_frame(settings):
    with pytest.raises(ConfigError, match="hdx"):
        Agent(settings(method={"router": "hdx"}))
    with pytest.raises(ConfigError, match="looks at no taps"):
        Agent(settings(method={"name": "source", "router": "hdc"}))


def test_the_board_tells_strange_frames(running, tmp_path, tiny_data):
    path = tmp_path / "dark.npz"
    np.savez(path, images=(tiny_data.images * 0.1).astype(np.uint8))
    agent = running(mode="shadow", source={"path": path}, budget={"learn_ms_per_s": 1e6})
    until(lambda: agent.board.status.ood is not None)
    assert agent.board.status.ood > 0.5
    assert agent.board.status.estimate is None  # the bundle was exported without
