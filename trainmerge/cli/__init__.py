"""The command line: commands, options and what they print."""

from trainmerge.cli.program import main

__all__ = ["main"]
