"""What the audit says: the figures of report.json, and of the table on the console.

report.json, format 1. Sizes are in pixels, shares in [0, 1].

    format, made (UTC), sfumato (version), seconds
    verdict      can_start, faults, records, share, max_faults, text
    sources      the data's sources, as the config says
    index        folder, fingerprint
    parts        [name, records, repeats (samples of each in an epoch)]
    records      total, usable, faults_scan, faults_pixels, too_small (without a bucket)
    pictures     formats {name: count}, traits {kind: count}, profiles {name: count}, hints (conditioning
                 images), smallest and largest {height, width}, and histograms {edges, counts} of aspects
                 (width / height) and sides (of the square of the same area)
    fit          cropped (mean share cut away), enlarged_at_least {factor: count}; at the largest resolution
    buckets      [bucket, height, width, resolution, records, cropped, cropped_most, enlarged, enlarged_most]
    captions     count, per_record {captions: records}, empty, odd, unit ("tokens" or "words"), why_words,
                 limit, over_limit, length {median, p90, p99, longest, counts}, longest [name, length, read,
                 cut], different, repeated, records_with_repeated, most_frequent [text, records, first]
    duplicates   exact and near: {groups, records, extra, largest: [[name, ...], ...]}
    problems     [kind, level ("fault", "look" or "note"), title, do, count, examples [name, detail]]
    reasons      {reason: count} of the faults

A record counts as a fault or in the other figures, never in both; but buckets hold the records of the index,
as a run does, also those whose pixels cannot be read. Lists of examples are bounded; faults.jsonl
and findings.jsonl have everything.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

import sfumato
from sfumato.audit import duplicates, fit
from sfumato.audit.captions import Captions
from sfumato.audit.duplicates import Groups
from sfumato.audit.findings import Findings
from sfumato.audit.pixels import Trait
from sfumato.audit.walk import NONE, Walk
from sfumato.audit.words import ruler
from sfumato.config import Config
from sfumato.data.buckets import Cells, reason
from sfumato.data.index import Index
from sfumato.data.sources.members import DAMAGED
from sfumato.data.sources.tars import Damage, damage
from sfumato.errors import UserError
from sfumato.report.counter import Counter

GROUPS, NAMES = 100, 20  # of duplicates, and of one group, that the report names
ALIKE = Trait.BLANK | Trait.FAULT
"""Pictures whose hashes say nothing."""


@dataclass
class Examination:
    """What the audit looks at, and what it has seen that pages show."""

    config: Config
    index: Index
    cells: Cells
    findings: Findings
    loud: bool
    """Whether progress is told."""

    def __post_init__(self) -> None:
        count = len(self.index)
        self.usable = np.zeros(count, bool)
        self.traits = np.zeros(count, np.uint16)
        self.damage = damage(self.index.sources, self.index.fault_lines())
        self.exact = self.near = Groups(np.zeros(0, np.int64), np.zeros(1, np.int64))


class Report(dict[str, Any]):
    """The content of report.json."""

    def text(self) -> str:
        """As a file holds it."""
        return json.dumps(self, indent=1) + "\n"


def reckon(look: Examination) -> Report:
    """Look at everything and reckon it up."""
    began = time.perf_counter()
    config, index, cells, findings = look.config, look.index, look.cells, look.findings
    for fault in index.faults:
        findings.fault(fault.name, fault.reason, "scan")
        if fault.reason.startswith(DAMAGED):
            findings.add("damaged_shard", fault.name, fault.reason)
    scan_faults = findings.counts["fault"]
    bucket = fit.buckets_of(cells, len(index))
    walk = Walk(index, config.data.max_pixels, cells.sizes, bucket)
    with Counter("pictures", look.loud) as counter:
        seen = walk.run(findings, counter.add)
    look.traits, look.usable = seen.traits, ~seen.has(Trait.FAULT)
    noted = note_traits(look)
    why = reason(config.data) if (bucket == NONE).any() else ""
    fitting = fit.misfits(index, cells, bucket, look.usable, findings, why)
    buckets = fit.bucket_table(config, index, cells)
    for row in buckets if config.data.buckets else ():
        if 0 < row["records"] < config.batch_size:
            findings.add("small_bucket", f"{row['width']} x {row['height']}", f"{row['records']:,} pictures")
    with Counter("captions", look.loud) as counter:
        captions = Captions(config.data, ruler(config.model), findings).run(index, look.usable, counter.add)
    twins = find_twins(look, seen.hashes, seen.colours)
    faults, total = findings.counts["fault"], len(index) + scan_faults
    return Report(
        format=1,
        made=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        sfumato=sfumato.__version__,
        seconds=round(time.perf_counter() - began, 1),
        verdict=verdict(faults, total, config.data.max_faults, look.damage),
        sources=[layout.source for layout in config.data.layouts],
        index={"folder": str(index.folder), "fingerprint": index.fingerprint},
        parts=[
            {"name": part.name, "records": part.count, "repeats": float(part.repeats)} for part in index.parts
        ],
        records={
            "total": total,
            "usable": int(look.usable.sum()),
            "faults_scan": scan_faults,
            "faults_pixels": faults - scan_faults,
            "too_small": findings.counts["too_small"],
        },
        pictures={
            "formats": dict(seen.formats.most_common()),
            "traits": noted,
            "profiles": dict(seen.profiles.most_common()),
            "hints": seen.hints,
            **fit.shapes(index.sizes, look.usable),
        },
        fit=fitting,
        buckets=buckets,
        captions=captions,
        duplicates=twins,
        problems=findings.problems(),
        reasons=dict(findings.reasons.most_common()),
    )


def note_traits(look: Examination) -> dict[str, int]:
    """Note what is odd about the pictures; how many there are of each kind."""
    traits = [trait for trait in Trait if trait is not Trait.FAULT]
    counts = dict.fromkeys((trait.kind for trait in traits), 0)
    for number in np.flatnonzero(look.usable & (look.traits != 0)).tolist():
        name, held = look.index.name(number), Trait(int(look.traits[number]))
        for trait in traits:
            if trait not in held:
                continue
            counts[trait.kind] += 1
            if trait is not Trait.HINT_SHAPE:  # which the walk has noted, with its sizes
                look.findings.add(trait.kind, name, "", number)
    return counts


def find_twins(look: Examination, hashes: np.ndarray, colours: np.ndarray) -> dict[str, Any]:
    """Note the pictures that are there more than once; what the report says of them."""
    assert look.index.digests is not None, "the index was opened without digests"
    look.exact = duplicates.exact(look.index.digests, look.usable)
    among = look.usable & ((look.traits & np.uint16(ALIKE)) == 0)
    for group in look.exact:
        among[group[1:]] = False
    look.near = duplicates.near(hashes, colours, among)
    told = {}
    for kind, groups in (("exact", look.exact), ("near", look.near)):
        for group in groups:
            first = look.index.name(int(group[0]))
            for number in group[1:].tolist():
                look.findings.add(f"{kind}_duplicate", look.index.name(number), f"as {first}")
        told[kind] = {
            "groups": len(groups),
            "records": len(groups.members),
            "extra": groups.extra,
            "largest": [
                [look.index.name(int(number)) for number in group[:NAMES]] for group in largest(groups)
            ],
        }
    return told


def largest(groups: Groups) -> list[np.ndarray]:
    """The groups of the most records."""
    order = np.argsort(-np.diff(groups.starts), kind="stable")[:GROUPS]
    return [groups.members[groups.starts[place] : groups.starts[place + 1]] for place in order]


def verdict(faults: int, total: int, allowed: float, damaged: Damage | None) -> dict[str, Any]:
    """Whether a run can start."""
    share, can_start = faults / total, faults <= allowed * total
    can_start = can_start and not (damaged and damaged.refusal(allowed))
    told = f"{faults:,} of {total:,} records cannot be used ({share:.2%})"
    told += f", and {damaged.damaged:,} of {damaged.shards:,} shards are damaged" if damaged else ""
    told += f", data.max_faults allows {allowed:.2%}"
    return {
        "can_start": can_start,
        "faults": faults,
        "records": total,
        "share": share,
        "max_faults": allowed,
        "text": f"A run {'can' if can_start else 'cannot'} start: {told}.",
    }


def refusal(report: Report, look: Examination, out: Path) -> UserError | None:
    """The error for data that a run refuses."""
    faults, total = report["verdict"]["faults"], report["verdict"]["records"]
    allowed = look.config.data.max_faults
    if faults <= allowed * total:
        return look.damage.refusal(allowed) if look.damage else None
    return UserError(
        f"at most {allowed:.2%} of {total:,} records unusable (data.max_faults)",
        f"{faults:,} ({faults / total:.2%}): {'; '.join(list(report['reasons'])[:3])}",
        f"mend or remove those that {out / 'faults.jsonl'} lists, or allow more",
    )


def table(report: Report) -> Table:
    """The summary for the console."""
    shown = Table(box=None, show_header=False, padding=(0, 1))
    shown.add_column(justify="right")
    shown.add_column(justify="right")
    shown.add_column()
    records, captions = report["records"], report["captions"]
    over = "" if captions["limit"] is None else f", of which {captions['limit']} are read"
    shown.add_row("", f"{records['usable']:,}", f"records of {records['total']:,} can be trained on")
    shown.add_row("", f"{sum(row['records'] > 0 for row in report['buckets']):,}", "sizes are trained at")
    shown.add_row(
        "",
        f"{captions['count']:,}",
        f"captions, half of up to {captions['length']['median']} {captions['unit']}, the longest of "
        f"{captions['length']['longest']}{over}",
    )
    style = {"fault": "red", "look": "yellow", "note": "dim"}
    for problem in report["problems"]:
        colour = style[problem["level"]]
        shown.add_row(Text(problem["level"], colour), f"{problem['count']:,}", Text(problem["title"]))
    good = report["verdict"]["can_start"]
    shown.add_row(
        Text("ok" if good else "no", "green" if good else "red"), "", Text(report["verdict"]["text"])
    )
    return shown
