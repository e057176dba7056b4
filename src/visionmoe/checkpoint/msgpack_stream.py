"""Reads msgpack from a file token by token, so that large binary values stay in the file until they are wanted.

The msgpack package reads a whole object into memory first. Here every declared length is compared with the bytes
that are left before anything is allocated, and a binary value is only its place in the file.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from visionmoe.checkpoint.errors import CheckpointError, printable

MAX_DEPTH = 64
_MAX_SCALAR_BYTES = 1 << 20  # names and small payloads; far above any real one

# First byte -> (kind, struct format of the number that follows).
_SIZED = {
    0xC4: ("bin", ">B"), 0xC5: ("bin", ">H"), 0xC6: ("bin", ">I"),
    0xC7: ("ext", ">B"), 0xC8: ("ext", ">H"), 0xC9: ("ext", ">I"),
    0xCA: ("value", ">f"), 0xCB: ("value", ">d"),
    0xCC: ("value", ">B"), 0xCD: ("value", ">H"), 0xCE: ("value", ">I"), 0xCF: ("value", ">Q"),
    0xD0: ("value", ">b"), 0xD1: ("value", ">h"), 0xD2: ("value", ">i"), 0xD3: ("value", ">q"),
    0xD9: ("str", ">B"), 0xDA: ("str", ">H"), 0xDB: ("str", ">I"),
    0xDC: ("array", ">H"), 0xDD: ("array", ">I"), 0xDE: ("map", ">H"), 0xDF: ("map", ">I"),
}  # fmt: skip
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_FIXED_EXT = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_LEAST_BYTES = {"bin": 1, "str": 1, "ext": 1, "array": 1, "map": 2}


@dataclass(frozen=True)
class Token:
    """kind: "value" (None, bool, int or float in `value`), "str", "bin", "ext", "array" or "map" (length in `value`).

    code: the type of an ext. The bytes of str, bin and ext, or the items of array and map, follow in the file.
    """

    kind: str
    value: Any
    code: int = 0


class Cursor:
    """A place in one file, from `start` to `stop`. Every fault is a `CheckpointError` that names the file."""

    def __init__(self, stream: BinaryIO, path: str, start: int, stop: int) -> None:
        self.stream, self.path, self.position, self.stop = stream, path, start, stop

    def fail(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is not a valid checkpoint file: {printable(reason)} (near byte {self.position})"
        )

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        if size > self.stop - self.position:
            raise self.fail("it ends too early")
        self.stream.seek(self.position)
        data = self.stream.read(size)
        if len(data) != size:
            raise self.fail("it ends too early")
        self.position += size
        return data

    def skip(self, size: int) -> int:
        """Passes over `size` bytes (already checked by `token`); returns where they begin."""
        start = self.position
        self.position += size
        return start

    def inside(self, size: int) -> "Cursor":
        """A cursor over the next `size` bytes, which this cursor passes over."""
        start = self.skip(size)
        return Cursor(self.stream, self.path, start, self.position)

    def end(self) -> None:
        """Raises when bytes are left over."""
        if self.position != self.stop:
            raise self.fail(f"{self.stop - self.position} bytes too many")

    def token(self) -> Token:
        """Reads the next token; a declared length never exceeds the bytes that are left."""
        token = self._token(self.take(1)[0])
        if token.kind != "value" and token.value * _LEAST_BYTES[token.kind] > self.stop - self.position:
            raise self.fail(f"a length of {token.value} is more than what is left of the file")
        return token

    def expect(self, kind: str, what: str, length: int | None = None) -> int:
        """Reads a token of `kind` and returns its length."""
        token = self.token()
        if token.kind != kind or (length is not None and token.value != length):
            raise self.fail(f"{what} must be a msgpack {kind}" + (f" of {length}" if length is not None else ""))
        return token.value

    def _token(self, first: int) -> Token:
        if first < 0x80:
            return Token("value", first)
        if first < 0x90:
            return Token("map", first & 0x0F)
        if first < 0xA0:
            return Token("array", first & 0x0F)
        if first < 0xC0:
            return Token("str", first & 0x1F)
        if first >= 0xE0:
            return Token("value", first - 256)
        if first in _CONSTANTS:
            return Token("value", _CONSTANTS[first])
        if first in _FIXED_EXT:
            return Token("ext", _FIXED_EXT[first], self._code())
        if first not in _SIZED:
            raise self.fail(f"unknown msgpack type 0x{first:02x}")
        kind, layout = _SIZED[first]
        value = struct.unpack(layout, self.take(struct.calcsize(layout)))[0]
        return Token(kind, value, self._code() if kind == "ext" else 0)

    def _code(self) -> int:
        return struct.unpack(">b", self.take(1))[0]


ExtHook = Callable[[int, Cursor], Any]


def decode(cursor: Cursor, ext: ExtHook, depth: int = 0) -> Any:
    """The next object as Python values; `ext(code, cursor over the payload)` makes the extension types."""
    if depth > MAX_DEPTH:
        raise cursor.fail(f"nested deeper than {MAX_DEPTH}")
    token = cursor.token()
    if token.kind == "value":
        return token.value
    if token.kind == "array":
        return [decode(cursor, ext, depth + 1) for _ in range(token.value)]
    if token.kind == "map":
        return _decode_map(cursor, ext, token.value, depth + 1)
    if token.kind == "ext":
        return ext(token.code, cursor.inside(token.value))
    if token.value > _MAX_SCALAR_BYTES:
        raise cursor.fail(f"a text of {token.value} bytes")
    return text(cursor, token) if token.kind == "str" else cursor.take(token.value)


def text(cursor: Cursor, token: Token) -> str:
    """The characters of a str token, or of a bin token (older writers made no difference)."""
    if token.kind not in ("str", "bin") or token.value > _MAX_SCALAR_BYTES:
        raise cursor.fail("a name must be a text")
    try:
        return cursor.take(token.value).decode("utf-8")
    except UnicodeDecodeError:
        raise cursor.fail("a text is not UTF-8") from None


def _decode_map(cursor: Cursor, ext: ExtHook, size: int, depth: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for _ in range(size):
        key = text(cursor, cursor.token())
        if key in result:
            raise cursor.fail(f"the name {key!r} occurs twice")
        result[key] = decode(cursor, ext, depth)
    return result
