"""The program `visionmoe`. Start-up imports no torch: every command imports what it needs when it runs."""

from visionmoe.cli.main import main

__all__ = ["main"]
