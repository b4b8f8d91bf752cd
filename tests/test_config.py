"""The loader of configurations: strict, all errors at once, each with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, model_validator

from edge_adapt import located
from edge_adapt.config import changes, json_schema, load_config, parse_config
from edge_adapt.errors import ConfigError
from edge_adapt.located import MAX_BYTES, plain, read


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Budget(Strict):
    power: float = Field(1.0, gt=0)
    queue: int = 4


class Link(Strict):
    host: str = "here"
    keys: tuple[Path, ...] = ()

    @model_validator(mode="after")
    def _named(self) -> Link:
        if self.host == "nowhere":
            raise ValueError("nowhere cannot be reached")
        return self


class Settings(Strict):
    name: str = Field(description="what it is called")
    folder: Path = Path("state")
    device: int | str = 0
    loop: bool = False
    level: str = Field("info", json_schema_extra={"live": True})
    budget: Budget = Field(Budget(), json_schema_extra={"live": True})
    link: Link | None = None
    extra: dict[str, Any] = {}


def refused(text: str | bytes) -> list[str]:
    """Lines of the message."""
    with pytest.raises(ConfigError) as caught:
        parse_config(text, Settings, "a.yaml")
    return [line.strip() for line in caught.value.what.splitlines()]


@pytest.fixture(params=["libyaml", "python"], autouse=True)
def parser(request, monkeypatch):
    """Both parsers of PyYAML say the same; a device may lack the fast one."""
    if request.param == "python":
        monkeypatch.setattr(located, "LOADER", yaml.SafeLoader)
    elif not yaml.__with_libyaml__:
        pytest.skip("PyYAML was built without libyaml")


def test_every_error_is_told_at_once_in_the_order_of_the_file():
    text = "nam: x\nbudget:\n  power: -3\n  queue: many\nlink:\n  hots: b\n  keys: [a, 5]\nname: y\nloop: 1\nname: z\n"
    assert refused(text) == [
        "a.yaml has 7 errors",
        "a.yaml:1: nam is no setting; did you mean name?",
        "a.yaml:3: budget.power is -3, expected greater than 0",
        "a.yaml:4: budget.queue is 'many', expected a valid integer",
        "a.yaml:6: link.hots is no setting; did you mean host?",
        "a.yaml:7: link.keys[1] is 5, expected text; quotes make a number one",
        "a.yaml:9: loop is 1, expected true or false",
        "a.yaml:10: name is set twice, first on line 8",
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("folder: x\n", "a.yaml:1: name is missing: what it is called"),
        ("name: x\nlink:\n  host: nowhere\n", "a.yaml:2: link: nowhere cannot be reached"),
        ("name: x\nbudget:\n", "a.yaml:2: budget is empty, expected settings, each on a line of its own and indented"),
        (
            "name: x\ndevice: []\n",
            "a.yaml:2: device is [], expected a valid integer, or text; quotes make a number one",
        ),
        ("name: 7\n", "a.yaml:1: name is 7, expected text; quotes make a number one"),
        ("name: x\nbudget: {power: .inf}\n", "a.yaml:2: budget.power is '.inf', expected a valid number"),
        ("name: x\nbudget: {power: 1e999}\n", "a.yaml:2: budget.power is '1e999', expected a valid number"),
        ("name: x\nbudget: {power: true}\n", "a.yaml:2: budget.power is True, expected a valid number"),
        ("name: x\nbudget:\n\tpower: 3\n", "a.yaml:3: the line is indented with a tab, expected spaces"),
        ("", "a.yaml:1: it is empty"),
        ("# nothing but this\n", "a.yaml:1: it is empty"),
        ("name: x\n---\nname: y\n", "a.yaml:2: a second document begins here, expected one"),
        ("name: x\n[a]: y\n", "a.yaml:2: a key is no plain word"),
        ("name: x\nextra: !!python/name:os.system\n", "a.yaml:2: tags (`!`) are not used here: leave it out, or quote"),
        ("name: x\nextra: &a {}\n", "a.yaml:2: anchors and aliases (`&`, `*`) are not used here: write the value out"),
        ('name: "a\\0b"\n', "a.yaml:1: there is a character that no text has, U+0000"),
        ("name: a\u2028b\n", "a.yaml:1: there is a character that no text has, U+2028"),
        (b"name: x\nlevel: \xff\n", "a.yaml:2: it is not UTF-8 text"),
    ],
)
def test_an_error_names_the_line_the_value_and_what_was_expected(text, told):
    assert refused(text)[0].startswith(told)


@pytest.mark.parametrize(
    "text", ["name: 'x\n", "name: [x\n", "name: {x\n", "name: x\n  y: z\n", "a: b: c\n", "name: %x\n", "- x\nname: y\n"]
)
def test_broken_yaml_is_told_with_a_line_and_nothing_else_is_guessed(text):
    (line,) = refused(text)
    assert line.startswith(("a.yaml:1:", "a.yaml:2:"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 100_000, "nested more than 32 levels deep"),
        ("extra: " + "{a: " * 1000, "nested more than 32 levels deep"),
        ("- a\n" * 20_000, "holds more than 10000 values"),
        ("x" * (MAX_BYTES + 1), "larger than 256 KiB"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "anchors and aliases"),
    ],
)
def test_bombs_are_refused_before_they_grow(text, told):
    assert told in refused(text)[0]


def test_many_errors_are_counted_beyond_those_shown():
    lines = refused("".join(f"unknown{index}: 1\n" for index in range(100)))
    assert lines[0] == "a.yaml has 101 errors" and lines[-1] == "and 61 more" and len(lines) == 42


@pytest.mark.parametrize(
    ("word", "meaning"),
    [
        *(("no", "no"), ("on", "on"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("true", True), ("~", None)),
        *(("12", 12), ("0x1f", 31), ("0o17", 15), ("017", 17), ("1e-3", 0.001), (".5", 0.5), ("1.", 1.0), ("-4", -4)),
        *(("1_000", "1_000"), ("3.1.1", "3.1.1"), ("9" * 65, "9" * 65), (".nan", ".nan"), ("1e999", "1e999")),
    ],
)
def test_plain_words_mean_what_yaml_1_2_says(word, meaning):
    assert plain(word) == meaning and type(plain(word)) is type(meaning)


@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(-(10**9), 10**9), st.text("abcé \"':#-\n", max_size=8)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.text("abc", min_size=1), inner, max_size=3)
        ),
        max_leaves=12,
    )
)
def test_json_is_read_as_it_is(value):
    found = read(json.dumps(value))
    assert not found.problems and found.value == value


def test_lines_are_those_that_an_editor_shows():
    found = read("a: 1\r\nb:\r\n  - x\r\n  -\r\n    c: |\r\n      long\r\n      text\r\n    d: 2\r\n")
    assert found.value == {"a": 1, "b": ["x", {"c": "long\ntext\n", "d": 2}]}
    assert [found.line(loc) for loc in (("a",), ("b",), ("b", 0), ("b", 1, "c"), ("b", 1, "d"))] == [1, 2, 3, 5, 8]
    assert found.line(("b", 1, "missing", "deeper")) == found.line(("b", 1)) in (4, 5)


def test_relative_paths_are_below_the_folder_of_the_file(tmp_path, monkeypatch):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "a.yaml").write_text(
        "name: x\nlink: {keys: [one.pub, /abs/two.pub]}\nextra: {path: as it is}\n"
    )
    monkeypatch.chdir(tmp_path)
    settings = load_config(Path("etc/a.yaml"), Settings)
    assert settings.link.keys == (tmp_path / "etc" / "one.pub", Path("/abs/two.pub"))
    assert settings.folder == tmp_path / "etc" / "state"  # a default too
    assert settings.extra == {"path": "as it is"}


def test_a_file_that_is_missing_a_folder_or_not_whole_is_refused(tmp_path):
    for path, told in ((tmp_path / "none.yaml", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(ConfigError, match=told):
            load_config(path, Settings)
    file = tmp_path / "a.yaml"
    file.write_text("name: x\nlevel: inf")
    with pytest.raises(ConfigError, match=r"a\.yaml:2: the last line does not end"):
        load_config(file, Settings)
    file.write_bytes(b"name: x\n# " + b"x" * MAX_BYTES)
    with pytest.raises(ConfigError, match="larger than 256 KiB"):
        load_config(file, Settings)


def test_a_mark_of_byte_order_is_no_error():
    assert parse_config(b"\xef\xbb\xbfname: x\n", Settings, "a.yaml").name == "x"


def test_changes_tell_what_is_live():
    old = Settings(name="x", folder=Path("a"))
    new = Settings(name="x", folder=Path("b"), level="debug", budget=Budget(power=2.0), link=Link())
    told = changes(old, new)
    assert [(change.path, change.live) for change in told] == [
        *(("folder", False), ("level", True), ("budget.power", False), ("link", False))
    ]
    assert str(told[2]) == "budget.power: 1.0 -> 2.0 (after a restart)"
    assert str(told[0]) == "folder: a -> b (after a restart)"
    assert changes(new, new) == []


def test_the_schema_marks_what_is_live_and_refuses_unknown_keys():
    schema = json_schema(Settings)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["additionalProperties"] is False and schema["properties"]["level"]["live"] is True
