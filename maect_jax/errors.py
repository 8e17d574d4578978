"""The exceptions that are meant for the person at the keyboard; each text is one clear line."""


class UserError(Exception):
    """Bad input: what is wrong, where, and what is allowed.

    `main` prints the line and exits with status 2; nothing is left half written.
    """


class RunFailedError(Exception):
    """A run that cannot go on: what happened, and what is left. Exit status 1."""


class BadImageError(Exception):
    """An image that cannot be read, and why; the loader takes another in its place."""
