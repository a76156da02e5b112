"""Any text as one word of bash, and as one value of an #SBATCH line."""

import re
from collections.abc import Sequence

PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")
"""Words that bash reads as they are."""
PLAIN_VALUE = re.compile(r"[^\s\"'\\#`$]+")
CONTROL = re.compile(r"[\x00-\x1f\x7f\x80-\x9f\u2028\u2029\ud800-\udfff]")
"""Characters that would break a line, that a terminal hides, or that stand for bytes that are no UTF-8."""


def quote(text: str) -> str:
    """`text` as one word of bash on one line, whatever is in it; sbatch refuses scripts with a bare "\\r"."""
    if PLAIN.fullmatch(text):
        return text
    if not CONTROL.search(text):
        return "'" + text.replace("'", "'\\''") + "'"
    safe = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + CONTROL.sub(octal, safe) + "'"


def octal(found: re.Match[str]) -> str:
    """The bytes of a character, each as \\nnn, after which no digit can be taken for its own."""
    return "".join(f"\\{byte:03o}" for byte in found[0].encode("utf-8", "surrogateescape"))


def words(texts: Sequence[str]) -> str:
    """Several words of bash."""
    return " ".join(map(quote, texts))


def value(text: str) -> str:
    """`text` as what stands behind the "=" of an #SBATCH line, as sbatch takes such a line apart."""
    assert not CONTROL.search(text), f"not for an #SBATCH line: {text!r}"
    if PLAIN_VALUE.fullmatch(text):
        return text
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
