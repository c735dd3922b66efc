"""How a command ends other than well; the exit codes of the `qlm` command."""

from __future__ import annotations

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class CommandFailed(RuntimeError):
    """The command ran but something in it failed (exit code 1); the message is one line."""


class CommandInterrupted(RuntimeError):
    """The user stopped the command (exit code 130); the message says how to go on."""
