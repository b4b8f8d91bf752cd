"""The command `edge-adapt` itself: what is loaded for which call."""

from __future__ import annotations

import subprocess
import sys

from edge_adapt.cli import build, run

LEAN = """
import sys
sys.argv = ["edge-adapt", "run", sys.argv[1]]
from edge_adapt.cli import main
try:
    main()
finally:
    print(sorted({"torch", "scipy", "rich", "PIL", "matplotlib"} & sys.modules.keys()))
"""


def names(asked: str | None = None) -> list[str]:
    app = build(asked)
    return sorted(str(each.name) for each in (*app.registered_commands, *app.registered_groups))


def test_only_the_command_that_was_called_is_loaded():
    assert names("run") == ["run"] and names("delta") == ["delta"]
    assert len(names()) > 5 and names("rnu") == names("--help") == names()


def test_a_lone_command_keeps_its_name_and_a_wrong_one_is_told_of_the_nearest(capsys):
    assert run(["run"]) == 2
    assert "edge-adapt run" in capsys.readouterr().err
    assert run(["rnu"]) == 2
    assert "'run'" in capsys.readouterr().err


def test_a_start_of_the_agent_waits_for_no_heavy_library(tmp_path):
    """A restart has two seconds until its first answer; torch alone takes that."""
    config = tmp_path / "agent.yaml"
    config.write_text("bundle: nowhere\nsource: {kind: archive, path: nothing.npz}\n")
    done = subprocess.run(
        [sys.executable, "-c", LEAN, str(config)], capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 2 and "nowhere" in done.stderr
    assert done.stdout.strip() == "[]"
