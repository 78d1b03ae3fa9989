"""What the command says when it cannot go on."""

from __future__ import annotations


class CommandError(Exception):
    """The command ends with exit code 2; the message is the one line that says why, and what to do."""
