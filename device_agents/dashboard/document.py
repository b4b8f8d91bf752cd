"""The page as one file: style and script are put into it, and a policy that lets the browser run these alone."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
SCRIPTS = ("charts.js", "page.js")


@dataclass(frozen=True)
class Document:
    """What is sent for `/`."""

    html: bytes
    policy: str
    """Content-Security-Policy."""
    instance: str
    """Public name of this run of the page; a browser that knows another one loads the page again."""

    @classmethod
    def load(cls, *, token: str, instance: str) -> Document:
        """Read the parts and put them together."""
        style = (FOLDER / "page.css").read_text("utf-8")
        script = '"use strict";\n' + "\n".join((FOLDER / name).read_text("utf-8") for name in SCRIPTS)
        html = (FOLDER / "page.html").read_text("utf-8")
        for mark, text in (
            ("<!-- style -->", f"<style>{style}</style>"),
            ("<!-- script -->", f"<script>{script}</script>"),
            ("{token}", token),
            ("{instance}", instance),
        ):
            html = html.replace(mark, text, 1)
        return cls(html.encode(), policy(style, script), instance)


def policy(style: str, script: str) -> str:
    """Nothing from elsewhere, nothing inside a frame, no script and no style but those two, no HTML made from text."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash(script)}",
            f"style-src {_hash(style)}",
            "img-src 'self' blob: data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        )
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
