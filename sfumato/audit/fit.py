"""How pictures fit what is trained at: which are enlarged, how much is cut away, what each bucket holds."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from sfumato.audit.findings import Findings
from sfumato.audit.walk import NONE
from sfumato.config import Config
from sfumato.data.buckets import Cells
from sfumato.data.index import Index

CHUNK = 2**18  # records that are reckoned with at once
CROPPED = 0.25  # share of a picture; from here on it is a finding
ASPECTS = 33  # bars of the histogram of aspects, from 1:4 to 4:1
SIDES = 32  # bars of the histogram of sides, from 2^4 to 2^14


def members(cells: Cells, bucket: int) -> Iterator[np.ndarray]:
    """The numbers of a bucket's records, in portions."""
    for part, count in enumerate(cells.counts[bucket].tolist()):
        for start in range(0, count, CHUNK):
            member = np.arange(start, min(start + CHUNK, count))
            yield cells.record(bucket, np.full(len(member), part), member)


def buckets_of(cells: Cells, records: int) -> np.ndarray:
    """(N,) uint16: the bucket of each record, of the largest resolution; NONE for one without."""
    found = np.full(records, NONE, np.uint16)
    for bucket in np.argsort([high * wide for high, wide in cells.sizes], kind="stable").tolist():
        for numbers in members(cells, bucket):
            found[numbers] = bucket
    return found


def fitted(sizes: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factor (n,) that pictures are enlarged by to cover their targets, and share (n,) then cut away.

    sizes, targets: (n, 2), height and width.
    """
    sizes = sizes.astype(np.float64)
    scale = (targets / sizes).max(1)
    return scale, 1 - targets.prod(1) / (sizes.prod(1) * scale**2)


def bucket_table(config: Config, index: Index, cells: Cells) -> list[dict[str, Any]]:
    """What each bucket holds, and how it fits."""
    rows = []
    for bucket, (high, wide) in enumerate(cells.sizes):
        row: dict[str, Any] = {
            "bucket": bucket,
            "height": high,
            "width": wide,
            "resolution": config.data.resolutions[cells.resolution[bucket]],
            "records": int(cells.counts[bucket].sum()),
        }
        cut, cut_most, enlarged, enlarged_most = 0.0, 0.0, 0, 0.0
        for numbers in members(cells, bucket):
            scale, away = fitted(index.sizes[numbers], np.array([(high, wide)]))
            cut += float(away.sum())
            cut_most = max(cut_most, float(away.max()))
            enlarged += int((scale > 1).sum())
            enlarged_most = max(enlarged_most, float(scale.max()))
        row |= {
            "cropped": cut / max(row["records"], 1),
            "cropped_most": cut_most,
            "enlarged": enlarged,
            "enlarged_most": max(enlarged_most, 1.0),
        }
        rows.append(row)
    return rows


def misfits(
    index: Index, cells: Cells, bucket: np.ndarray, usable: np.ndarray, findings: Findings, why: str
) -> dict[str, Any]:
    """Note what has no bucket (why: the reason), is enlarged or much cut; the figures of all that fit.

    bucket: (N,), of `buckets_of`. usable: (N,) bool.
    """
    targets = np.array(cells.sizes)
    factors = {"1.25": 0, "1.5": 0, "2": 0, "4": 0}
    total, cut = 0, 0.0
    for start in range(0, len(index), CHUNK):
        numbers = np.arange(start, min(start + CHUNK, len(index)))
        numbers = numbers[usable[numbers]]
        for number in numbers[bucket[numbers] == NONE].tolist():
            findings.add("too_small", index.name(number), why, number)
        numbers = numbers[bucket[numbers] != NONE]
        scale, away = fitted(index.sizes[numbers], targets[bucket[numbers]])
        total, cut = total + len(numbers), cut + float(away.sum())
        for bound in factors:
            factors[bound] += int((scale >= float(bound)).sum())
        for place in np.flatnonzero(scale > 1).tolist():
            number, factor = int(numbers[place]), float(scale[place])
            findings.add("enlarged", index.name(number), f"made {factor:.2f} times as large", number, factor)
        for place in np.flatnonzero(away >= CROPPED).tolist():
            number, share = int(numbers[place]), float(away[place])
            findings.add("cropped", index.name(number), f"{share:.0%} cut away", number, share)
    return {"cropped": cut / max(total, 1), "enlarged_at_least": factors}


def shapes(sizes: np.ndarray, usable: np.ndarray) -> dict[str, Any]:
    """Figures and histograms of the usable pictures' sizes. sizes: (N, 2), height and width."""
    aspect_edges = np.logspace(-2, 2, ASPECTS + 1, base=2)
    side_edges = np.logspace(4, 14, SIDES + 1, base=2)
    aspects, sides = np.zeros(ASPECTS, np.int64), np.zeros(SIDES, np.int64)
    least, most = None, None
    for start in range(0, len(sizes), CHUNK):
        chunk = sizes[start : start + CHUNK][usable[start : start + CHUNK]].astype(np.float64)
        if not len(chunk):
            continue
        ratio, side = chunk[:, 1] / chunk[:, 0], np.sqrt(chunk.prod(1))
        aspects += np.histogram(ratio.clip(aspect_edges[0], aspect_edges[-1]), aspect_edges)[0]
        sides += np.histogram(side.clip(side_edges[0], side_edges[-1]), side_edges)[0]
        low, high = chunk[side.argmin()], chunk[side.argmax()]
        least = low if least is None or low.prod() < least.prod() else least
        most = high if most is None or high.prod() > most.prod() else most
    return {
        "smallest": None if least is None else {"height": int(least[0]), "width": int(least[1])},
        "largest": None if most is None else {"height": int(most[0]), "width": int(most[1])},
        "aspects": {"edges": aspect_edges.round(4).tolist(), "counts": aspects.tolist()},
        "sides": {"edges": side_edges.round(1).tolist(), "counts": sides.tolist()},
    }
