"""Reports as a test reads them: tags, text, and the tables that their links save."""

from __future__ import annotations

import base64
import csv
import io
from html.parser import HTMLParser


class Page(HTMLParser):
    """The tags of a page, and the text that a reader can see."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())

    def table(self, key: str) -> list[list[str]]:
        """The CSV that a link of the page saves under this name."""
        [link] = [attrs["href"] for tag, attrs in self.tags if attrs.get("download") == f"{key}.csv"]
        head, _, body = (link or "").partition(",")
        assert head == "data:text/csv;charset=utf-8;base64"
        return list(csv.reader(io.StringIO(base64.b64decode(body).decode(), newline="")))
