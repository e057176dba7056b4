"""Errors of checkpoint files: one line that names the file."""


class CheckpointError(ValueError):
    """A checkpoint file is cut, altered or not what it says it is."""


class MissingFileError(CheckpointError, FileNotFoundError):
    """A file of a checkpoint is not there."""


def printable(text: str) -> str:
    """`text` as one line: a broken file's names may hold anything."""
    return "".join(character if character.isprintable() else "?" for character in text)
