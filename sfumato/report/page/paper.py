"""The file itself: templates, style and scripts put together, and published in one rename."""

import base64
import hashlib
import json
import os
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sfumato import __version__
from sfumato.report.page.words import figure

HOME = Path(__file__).parent
MARK = "sfumato report"
"""What a page of ours says of its origin."""
STALE = 3600  # seconds after which an unfinished file is nobody's
HARMLESS = str.maketrans(
    {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
)


def printed(template: str, values: Mapping[str, Any]) -> str:
    """A page. values: of its template, with `told` and `drawn` as what its scripts are given, if they are."""
    scripts = {
        name: "\n" + (HOME / f"{name}.js").read_text(encoding="utf-8") for name in ("curves", "pictures")
    }
    # No other script runs, wherever it comes from.
    allowed = " ".join(f"'sha256-{sum_of(text)}'" for text in scripts.values())
    page = (
        printer()
        .get_template(template)
        .render(
            css=(HOME / "page.css").read_text(encoding="utf-8"),
            scripts={**scripts, "allowed": allowed},
            generator=MARK,
            version=__version__,
            when=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            **{
                **values,
                "told": as_json(values["told"]),
                "drawn": values["drawn"] and as_json(values["drawn"]),
            },
        )
    )
    # A lone half of a pair, as JSON may hold, is no text that a file can.
    return page.encode("utf-8", "replace").decode("utf-8")


@cache
def printer() -> Environment:
    """Templates that escape whatever they are given."""
    made = Environment(
        loader=FileSystemLoader(HOME),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["figure"] = figure
    return made


def as_json(values: Any) -> str:
    """JSON that ends no script's element."""
    text = json.dumps(values, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return text.translate(HARMLESS)


def sum_of(text: str) -> str:
    """A script's sum, as a content security policy names it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def publish(text: str, path: Path) -> None:
    """Write a file so that a reader sees the old one or the new one. Raises OSError, and leaves no part."""
    for left in path.parent.glob(f".{path.name}.*.part"):
        if time.time() - left.lstat().st_mtime > STALE:
            left.unlink(missing_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError:
        try:
            part.unlink(missing_ok=True)
        except OSError:
            pass
        raise
