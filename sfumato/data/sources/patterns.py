"""Names of many files in one text: braces, as "{00000..00099}.tar" and "{cats,dogs}.tar"."""

import re
from itertools import product

from sfumato.errors import UserError

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
MOST = 1_000_000


def expand(pattern: str) -> list[str]:
    """Every name that the braces stand for, in order. Numbers keep their zeros in front.

    Raises UserError for braces that say neither numbers nor a list, and for more than a million names.
    """
    # Every second piece is what stood within braces.
    pieces = BRACES.split(pattern)
    choices = [choice(piece, pattern) if n % 2 else [piece] for n, piece in enumerate(pieces)]
    total = 1
    for each in choices:
        total *= len(each)
        check_number(total, pattern)
    return ["".join(names) for names in product(*choices)]


def choice(inner: str, pattern: str) -> list[str]:
    """What stands for one pair of braces."""
    if "," in inner:
        return inner.split(",")
    found = RANGE.fullmatch(inner)
    if found is None:
        do = "write {00000..00099}, or {cats,dogs}"
        raise UserError(f'the braces of "{pattern}"', f"{{{inner}}}", do)
    if max(map(len, found.groups())) > 18:
        check_number(MOST + 1, pattern)
    first, last = int(found[1]), int(found[2])
    step = 1 if first <= last else -1
    check_number(abs(last - first) + 1, pattern)
    padded = any(len(text) > 1 and text[0] == "0" for text in found.groups())
    width = max(map(len, found.groups())) if padded else 0
    return [f"{number:0{width}}" for number in range(first, last + step, step)]


def check_number(total: int, pattern: str) -> None:
    """Raise UserError if there are more names than any data set has files."""
    if total > MOST:
        raise UserError(f'"{pattern}"', f"more than {MOST:,} names", "correct the numbers")
