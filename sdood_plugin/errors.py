"""The two kinds of failure a user can meet; each message is one line: what, value, expected, remedy."""

from __future__ import annotations


class SdoodError(ValueError):
    """A failure the user can mend. `exit_code` is what the command line ends with.

    Args:
        what: The thing that is wrong, by the name the user knows it by.
        value: What was found.
        expected: What would have been right.
        remedy: What to do about it.
    """

    exit_code = 1

    def __init__(self, what: str, value: object, expected: str, remedy: str) -> None:
        super().__init__(f"{what}: got {value}; expected {expected}; {remedy}".replace("\n", " "))


class UsageError(SdoodError):
    """A setting or argument that can never work, found before any work is done (exit code 2)."""

    exit_code = 2


class RunError(SdoodError):
    """Data, disk or numerics that failed while working; finished stages stay as they are (exit code 1)."""
