"""The error with which a command ends."""

from __future__ import annotations


class CommandError(Exception):
    """Ends the command with exit code 2. The message is one line that gives the reason and the remedy."""
