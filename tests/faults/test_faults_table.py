"""The table of faults in the documentation says what the tests are marked with, row by row, and the other way round."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "faults.md"
ROWS = range(1, 36)
UNTESTED: set[int] = set()
"""Rows that cannot be tested without hardware; their cell gives the reason."""
NAMED = re.compile(r"`((?:\w+/)*test_\w+)::(test_\w+)`")


def fault_of(decorator: ast.expr) -> int | None:
    """The number in `@pytest.mark.fault(number)`."""
    if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.fault":
        (number,) = decorator.args
        return int(ast.literal_eval(number))
    return None


def functions(path: Path) -> list[ast.FunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name.startswith("test_")]


def marked() -> dict[int, set[tuple[str, str]]]:
    """Row -> file and name of each test that is marked with it."""
    found: dict[int, set[tuple[str, str]]] = defaultdict(set)
    for path in sorted((TESTS / "faults").glob("test_*.py")):
        for function in functions(path):
            for number in filter(None, map(fault_of, function.decorator_list)):
                found[number].add((path.stem, function.name))
    return found


def table() -> dict[int, list[str]]:
    """Row -> its other cells: fault, promises, tests."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if re.match(r"\| \d+ \|", line)]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({each[0] for each in cells}) == len(cells), "a row stands there twice"
    return {int(number): rest for number, *rest in cells}


def test_the_table_has_every_row_with_its_promise_and_tests_or_the_reason_why_not():
    rows = table()
    assert list(rows) == list(ROWS)
    for number, (fault, promises, tests) in rows.items():
        assert fault and re.fullmatch(r"R[1-9](, R[1-9])*", promises), number
        assert bool(NAMED.search(tests)) == (number not in UNTESTED), number
        assert len(tests) > 40, f"row {number} gives no reason"


def test_marks_and_table_agree():
    listed = {
        number: {(name, test) for name, test in NAMED.findall(tests) if "/" not in name}
        for number, (_, _, tests) in table().items()
    }
    found = marked()
    for number in sorted({*found, *listed}):
        here, there = found[number], listed.get(number, set())
        assert here == there, f"row {number}: the table lacks {sorted(here - there)} and has {sorted(there - here)}"


def test_every_test_that_the_page_names_exists():
    for name, test in NAMED.findall(PAGE.read_text(encoding="utf-8")):
        path = TESTS / (name if "/" in name else f"faults/{name}")
        assert test in {each.name for each in functions(path.with_suffix(".py"))}, f"{name}::{test}"
