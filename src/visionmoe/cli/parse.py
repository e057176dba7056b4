"""Command-line arguments to a dataclass of options, with errors of one line."""

import contextlib
import difflib
import io
import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

import tyro

from visionmoe.files import one_line

T = TypeVar("T")
_BOX = "╭╮╰╯│─"


class UsageError(ValueError):
    """A mistake in the command line."""


def parse(kind: type[T], arguments: Sequence[str], prog: str) -> T | None:
    """The options `kind` filled from `arguments`; None when help was asked for and printed.

    Raises UsageError with one line where tyro would print a box.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(kind, args=list(arguments), prog=prog, description=kind.__doc__)
    except SystemExit as end:
        if not end.code:
            return None
        raise UsageError(f"{unboxed(printed.getvalue())} (see {prog} --help)") from None


def unboxed(text: str) -> str:
    """The message of an error box as one line: its first part, and what was perhaps meant."""
    parts: list[list[str]] = [[]]
    for line in text.splitlines():
        inner = line.strip(_BOX + " ")
        if inner:
            parts[-1].append(inner)
        elif "─" in line:
            parts.append([])
    parts = [part for part in parts if part]
    lines = parts[0][1:]  # the title is in the border
    if lines[0].startswith("Missing from"):
        return f"required but missing: {lines[1]}"
    message = one_line(" ".join(lines)).partition(" Got errors:")[0]
    wrong = re.match(r"Error parsing (\S+):.*'(.*)'", message)
    if wrong and len(parts) > 1 and len(parts[1]) > 1:  # the second part shows the option and its type
        return f"{wrong[1]} must be {parts[1][1].removeprefix(wrong[1]).strip()}, got {wrong[2]!r}"
    names = [line.split()[0] for part in parts[1:] if part[0].startswith("Perhaps") for line in part[1:]]
    meant = [name for name in names if name.startswith("--")]
    return message.rstrip(".") + (f"; did you mean {meant[0].rstrip(',')}?" if meant else "")


def expanded_shards(arguments: Sequence[str]) -> str:
    """A hint, where the shell has made several arguments of wds:NAME-{000..127}.tar; else nothing."""
    shards = [re.sub(r"\d+", "", text) for text in arguments if text.startswith("wds:")]
    if len(shards) == len(set(shards)):
        return ""
    return "; the shell has taken a pattern of shards apart: quote it, as 'wds:NAME-{000..127}.tar'"


def closest(given: str, allowed: Iterable[str]) -> str:
    """A hint: the nearest allowed name, or all of them."""
    allowed = list(allowed)
    near = difflib.get_close_matches(given, allowed, n=1)
    return f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(allowed)}"
