"""Numbers of bytes as people write and read them: `200MB`, `1.5GiB`."""

import re
from fractions import Fraction

from lora_hub.errors import InputError

# kB, MB and GB are decimal, as disks and the Hub count; KiB, MiB and GiB are powers of two.
UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.ASCII | re.IGNORECASE)


def to_bytes(size: int | str, *, where: str) -> int:
    """Return the number of bytes that a size means, rounded down.

    Args:
        size: a whole number of bytes, or text such as `200MB` or `1.5 GiB`.
        where: what the size is for, in messages.

    Raises:
        InputError: it is no size.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    unit = UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None:
        raise InputError(
            f"{size!r} is no size, expected a number of bytes or text such as '200MB'",
            where=where,
            hint="units are kB, MB, GB, TB and KiB, MiB, GiB, TiB",
        )
    return int(Fraction(found[1]) * unit)


def to_text(size_bytes: int) -> str:
    """Return a size a person can read, in decimal units."""
    if size_bytes < 1000:
        return f"{size_bytes} B"
    amount, units = size_bytes / 1000, ["TB", "GB", "MB", "kB"]
    while amount >= 1000 and len(units) > 1:
        amount /= 1000
        units.pop()
    return f"{amount:.1f} {units[-1]}"
