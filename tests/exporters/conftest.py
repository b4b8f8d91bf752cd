"""Commands that must fail, and models of a user for them."""

from __future__ import annotations

import sys

import pytest
from refusals import FACTORIES, WRONG, assert_clear

from edge_adapt.cli import run


@pytest.fixture
def factories(tmp_path, monkeypatch) -> str:
    """Name of an importable package with models of a user."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "users_models.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "users_models", raising=False)
    return "users_models"


@pytest.fixture
def refused(capsys):
    """Run a command that must fail: exit code 2, one message with a remedy and no traceback; returns the message."""

    def call(*arguments: object) -> str:
        code = run([str(argument) for argument in arguments])
        shown = capsys.readouterr().err
        assert code == WRONG, shown
        assert_clear(shown)
        return shown

    return call
