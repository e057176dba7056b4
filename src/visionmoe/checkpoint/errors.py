"""Errors of checkpoint files: one line that names the file."""


class CheckpointError(ValueError):
    """A checkpoint file is cut, altered or not what it says it is."""


class MissingFileError(CheckpointError, FileNotFoundError):
    """A file of a checkpoint is not there."""
