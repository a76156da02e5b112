"""Numbers and times as the page's readers say them."""

import math
import time
from typing import Any

from sfumato.report.page.lines import number
from sfumato.report.progress import duration


def figure(value: Any) -> str:
    """A number with about four digits; "–" where there is none."""
    value = number(value)
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size >= 1e7 or (0 < size < 1e-3):
        return f"{value:.3e}".replace("e-0", "e-").replace("e+0", "e")
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def when(seconds: Any) -> str:
    """A time as a date; "" where it is none."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(number(seconds)))
    except (ValueError, OverflowError, OSError):
        return ""


def long(seconds: Any) -> str:
    """A time's length; "–" where it is none."""
    value = number(seconds)
    return duration(value) if math.isfinite(value) and value >= 0 else "–"


def several(count: int, what: str) -> str:
    """So many of something, in the right number."""
    return f"{count:,} {what}{'s' * (count != 1)}"
