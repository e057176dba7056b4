"""Sizes in words ("80GB"), both ways."""

import re

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def parse_bytes(text: str) -> int:
    """ "80GB" -> 80 * 10**9, "80GiB" -> 80 * 2**30; B, KB, MB, GB, TB and KiB ... TiB; a unit must be given."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise ValueError(f"a size must be like 80GB, 80GiB or 500MB, got {text!r}")
    return round(float(match[1]) * unit)


def scale(size: float) -> tuple[float, str]:
    """The unit that suits: bytes in it, and its name."""
    units = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    return next(((unit, name) for unit, name in units if size >= 0.9995 * unit), (1.0, "B"))


def in_words(size: float) -> str:
    """Three digits and the unit that suits: 51.2 GB, 900 MB, 1.25 kB, 0 B."""
    unit, name = scale(size)
    return f"{float(f'{size / unit:.3g}'):,g} {name}"
