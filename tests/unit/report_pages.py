"""What tests ask of a report's page, and a run whose every text is hostile."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from sfumato.report import page
from tests.unit import run_files

HOSTILE = (
    '"><img src=x onerror="alert(1)"></script><script>alert(2)</script><!-- {{ 7*7 }} \u2028 \u202e \ud83e'
)
"""Ends attributes, elements and scripts, opens comments, and is half a letter at its end."""


OURS = [path.read_text(encoding="utf-8").strip() for path in Path(page.__file__).parent.glob("*.js")]


class Tags(HTMLParser):
    """What a page consists of, as a browser's parser would see it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words, self.inside, self.comments = "", "", 0
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_comment(self, data: str) -> None:
        self.comments += 1

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        self.words += "" if self.inside in ("script", "style") else data + " "

    @property
    def told(self) -> str:
        """The page's words."""
        return " ".join(self.words.split())


def check_harmless(text: str) -> None:
    """Fail for a script that is not ours, a handler, a comment, or an address of anything outside."""
    seen = Tags(text)
    for script, text_of in zip(
        (attrs for tag, attrs in seen.tags if tag == "script"), seen.scripts, strict=True
    ):
        assert script.keys() <= {"type", "id"}, script
        assert script.get("type") == "application/json" or text_of.strip() in OURS, text_of[:200]
    assert not seen.comments and text.endswith("</html>")
    for tag, attrs in seen.tags:
        assert tag not in ("iframe", "object", "embed", "base", "form", "svg"), tag
        assert not [name for name in attrs if name.startswith("on")], (tag, attrs)
        for name in ("src", "href"):
            assert (attrs.get(name) or "#").startswith(("data:", "#")), (tag, attrs)
    assert not re.search(r"@import|url\(", text.split("</style>")[0])


def given(text: str, name: str) -> Any:
    """What a page gives to its scripts."""
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', text, re.DOTALL)
    return json.loads(found[1]) if found else None


def hostile_run(place: Path) -> Path:
    """A run whose every text is hostile."""
    folder = run_files.write(place, "hostile", steps=40, preview__prompts=[HOSTILE])
    resolved = json.loads((folder / "resolved.json").read_text())
    (folder / "resolved.json").write_text(json.dumps(resolved | {"name": HOSTILE}))
    environment = {"sfumato": HOSTILE, "packages": {HOSTILE: HOSTILE}, "variables": {HOSTILE: HOSTILE}}
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "summary.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    rows = [row | {HOSTILE: 1.0 * row["step"], "bucket": {HOSTILE: 1}} for row in run_files.lines(40)]
    run_files.jsonl(folder / "metrics.jsonl", rows)
    looked = [row | {"weights": HOSTILE} for row in run_files.validation(40, 10)]
    run_files.jsonl(folder / "validation.jsonl", looked)
    run_files.jsonl(folder / "faults" / "index.jsonl", [{"name": HOSTILE, "reason": HOSTILE, "part": 0}])
    run_files.jsonl(folder / "starts.jsonl", [{"time": 1.0, "step": 0, "world": 1, "device": HOSTILE},
                                              {"time": 2.0, "step": 40, "end": HOSTILE}])  # fmt: skip
    samples = [{"name": HOSTILE, "caption": HOSTILE, "loss": HOSTILE}]
    (folder / "bad" / "step-000013" / "batch.json").write_text(json.dumps({"step": 13, "samples": samples}))
    shutil.rmtree(folder / "images")
    run_files.previews(folder, [0, 40], 40, (HOSTILE, "plain"))
    facts = {"step": HOSTILE, "family": HOSTILE, "trigger": HOSTILE}
    (folder / "export" / "sfumato.json").write_text(json.dumps(facts))
    return folder
