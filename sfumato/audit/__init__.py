"""The audit of the data: everything about the data that can be known before a model is loaded, on one page.

    page = examine(config, Path("runs/mine/data"), print)

`out` then holds report.html, one file for people; report.json, for programs (`account` says what is in it);
faults.jsonl, the records of no use: {"name", "reason", "found_in": "scan" or "pixels"}; and findings.jsonl,
everything else that was noted: {"kind", "name", "detail"}, kinds as in `findings.KINDS`.
"""

import os
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from sfumato.audit.account import Examination, reckon, refusal, table
from sfumato.audit.findings import Findings, writing
from sfumato.audit.page import render
from sfumato.config import Config
from sfumato.data.buckets import Cells
from sfumato.data.index import open_index

__all__ = ["examine"]


def examine(
    config: Config,
    out: Path,
    tell: Callable[[str], None] | None = None,
    console: Console | None = None,
) -> Path:
    """Look at every record of a config's data and write what is found to the folder `out`; the page's path.

    tell: hears of long work; None: nothing is said. console: for the summary at the end.
    Raises UserError where a run would refuse the data, after everything was written; and for a source that
    cannot be read, or a folder that cannot be written to.
    """
    say = tell or (lambda line: None)
    index = open_index(config.data, digests=True, tell=say)
    cells = Cells.build(index.folder, config.data, index.sizes, index.part, len(index.parts))
    with Findings(out) as findings:
        examination = Examination(config, index, cells, findings, tell is not None)
        report = reckon(examination)
        html = render(report, examination)
    with writing(out):
        write(out / "report.json", report.text())
        write(out / "report.html", html)
    if tell is not None or console is not None:
        shown = console or Console()
        shown.print(table(report))
        for name in ("report.html", "report.json"):
            shown.print(str(out / name), soft_wrap=True, markup=False, highlight=False)
    if refused := refusal(report, examination, out):
        raise refused
    return out / "report.html"


def write(path: Path, text: str) -> None:
    """Put a text into a file, all at once; what is no text, as in some file names, is written as \\udc80."""
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_bytes(text.encode("utf-8", "backslashreplace"))
    os.replace(scratch, path)
