"""The exceptions that are meant for the person at the keyboard; each text is one clear line."""

_SHOWN = 200  # characters


def shown(text: str) -> str:
    """A text as part of a line: in one line, and the start of a long one."""
    line = text if text.isprintable() else repr(text)[1:-1]
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."


class UserError(Exception):
    """Bad input: what is wrong, where, and what is allowed.

    `main` prints the line and exits with status 2; nothing is left half written.
    """


class RunFailedError(Exception):
    """A run that cannot go on: what happened, and what is left. Exit status 1."""


class PreemptedError(Exception):
    """A run that was asked to end, by a signal, and has saved where it is. Exit status 75."""


class BadImageError(Exception):
    """An image that cannot be read, and why; the loader takes another in its place."""
