"""The page of domains: made from the files that are there, and one command makes them."""

from __future__ import annotations

import json

from benchmarks import domains


def test_the_page_shows_what_the_files_hold_and_leaves_out_what_is_not_there(tmp_path):
    row = {"method": "moments", "windows": 60, "error": 0.033, "bias": -0.01, "held": 0.9, "width": 0.2}
    collapses = [{"method": "moments", "seen_after": frames} for frames in (32, None)]
    (tmp_path / "accuracy-burst.json").write_text(
        json.dumps({"scenario": "burst", "summary": [row, {**row, "method": "all"}], "collapses": collapses})
    )
    text = domains.page(tmp_path)
    assert "| burst | moments | 60 | 3.3 | -1.0 | 90 | 20 | 1 of 2, within 32 |" in text
    assert "| all |" not in text and "Strangers" not in text


def test_what_was_made_is_not_made_again(tmp_path, monkeypatch):
    made = []
    stub = {name: (lambda name=name: made.append(name) or {"cost": []}) for name in "ab"}
    monkeypatch.setattr(domains, "parts", lambda *_, **__: stub)
    (tmp_path / "a.json").write_text("{}")
    domains.run(tmp_path, tmp_path, tmp_path)
    assert made == ["b"] and (tmp_path / domains.PAGE).exists()
