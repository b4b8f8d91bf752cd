"""What an agent reports about itself: settings in force, what answers, versions; published when it changes."""

from __future__ import annotations

import json

from agents import ROOT, command, mqtt_to, running, settings, stream, until

__all__ = ["running", "settings", "stream"]


def test_the_reported_document_follows_what_is_in_force(running, mosquitto, observer):
    broker = mosquitto()
    watcher = observer(broker, filters=[f"{ROOT}/#"])
    agent = running(**mqtt_to(broker), mode="shadow")

    def reported():
        told = watcher.of(f"{ROOT}/reported")
        return told[-1]["d"] if told else None

    first = until(reported)
    assert first["versions"] == {"edge_adapt": agent.network._about()["edge_adapt"], "bundle": agent.core.bundle.id}
    assert (first["config"]["mode"], first["config"]["method"]["name"]) == ("shadow", "moments")
    until(lambda: reported()["slots"] == {"answers": "source", "on_probation": False, "frozen": False})
    watcher.publish(f"{ROOT}/desired", json.dumps({"v": 1, "d": {"ver": 4, "config": {"mode": "bounded_auto"}}}))
    until(lambda: reported()["slots"]["answers"] == "own")
    assert (reported()["applied_desired_ver"], reported()["config"]["mode"]) == (4, "bounded_auto")
    assert reported()["ver"] > first["ver"]
    command(agent, "freeze", on=True)
    until(lambda: reported()["slots"]["frozen"])
    count = len(watcher.of(f"{ROOT}/reported"))
    answered = agent.board.status.answered
    until(lambda: agent.board.status.answered > answered + 200)
    assert len(watcher.of(f"{ROOT}/reported")) == count  # nothing changed, nothing is told
    assert command(agent, "rebirth")["status"] == "done"
    until(lambda: len(watcher.of(f"{ROOT}/reported")) == count + 1)
