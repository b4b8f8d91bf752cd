"""Published tables are what the committed results say, and drift is noticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import published
from benchmarks.plans.plan import load_plan
from benchmarks.sweep import BOARDS, read_cells
from edge_adapt import cli
from edge_adapt.errors import DataError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the tables are made from and stand in."""
    shutil.copytree(ROOT / published.RESULTS, tmp_path / published.RESULTS)
    shutil.copy(ROOT / "README.md", tmp_path)
    published.write(tmp_path)
    return tmp_path


def test_the_committed_tables_are_what_the_results_say() -> None:
    assert published.drifted(ROOT) == [], "run `edge-adapt bench tables --write`"


def test_a_changed_figure_is_noticed_and_mended(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = checkout / "README.md"
    before = readme.read_text()
    readme.write_text(before.replace("| source | 48.0 |", "| source | 49.9 |"))
    assert readme.read_text() != before
    assert cli.run(["bench", "tables", str(checkout)]) == 1
    assert str(readme) in capsys.readouterr().out
    assert cli.run(["bench", "tables", str(checkout), "--write"]) == 0
    assert readme.read_text() == before
    assert cli.run(["bench", "tables", str(checkout), "--check"]) == 0


def test_new_results_make_every_table_drift(checkout: Path) -> None:
    path = checkout / published.RESULTS / "resnet20-device.json"
    results = json.loads(path.read_text())
    for cell in results["cells"]:
        if cell["method"] == "moments":
            cell["error"] = 12.3
    path.write_text(json.dumps(results))
    assert published.drifted(checkout) == [checkout / published.RESULTS / "README.md", checkout / "README.md"]
    published.write(checkout)
    assert "| moments | 12.3 |" in (checkout / "README.md").read_text()
    assert published.drifted(checkout) == []


def test_the_plan_of_every_table_has_its_cells() -> None:
    plans = sorted((ROOT / published.RESULTS / "plans").glob("*.yaml"))
    assert "resnet20-device" in {path.stem for path in plans}
    for path in plans:
        asked = load_plan(path).combinations()
        cells = read_cells(ROOT / published.RESULTS, path.stem)
        assert {(one.method, one.seed) for one in asked} == {(cell["method"], cell["seed"]) for cell in cells}
        assert len(asked) == len(cells)
        assert {one.batch_size for one in asked} == {BOARDS[path.stem].batch_size}
        recipe = load_plan(path).used_bundles()[path.stem].export
        assert recipe is not None
        assert recipe.weights == str(path.parent / f"../../../../shared/data/{BOARDS[path.stem].weights}")


def test_only_the_block_is_written(checkout: Path) -> None:
    readme = checkout / "README.md"
    before = readme.read_text()
    head, _, rest = before.partition("<!-- methods -->\n")
    tail = rest.partition("<!-- /methods -->")[2]
    readme.write_text(f"{head}<!-- methods -->\nanything\n<!-- /methods -->{tail}")
    published.write(checkout)
    assert readme.read_text() == before


@pytest.mark.parametrize("text", ["no block", "<!-- methods -->\nno end", 2 * "<!-- methods -->\n<!-- /methods -->\n"])
def test_a_block_that_has_no_place_is_named(checkout: Path, text: str) -> None:
    (checkout / "README.md").write_text(text)
    with pytest.raises(DataError, match=r"README\.md has \d blocks <!-- methods -->"):
        published.drifted(checkout)


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no results"):
        published.drifted(tmp_path)
