"""The errors a user can cause; each is one line that names the thing, the value and the remedy.

Every one derives from ``PathSegDiffError``, which the command line turns into one line on stderr
and exit code 1. A bug raises something else and keeps its traceback.
"""

#: What reading the values of a damaged or hostile JSON file can raise, where it is no JSON or holds
#: something else than was written.
MALFORMED = (
    *(ValueError, KeyError, TypeError, AttributeError, OverflowError, IndexError),
    RecursionError,
)
#: Of a message; what a file puts into it may be longer.
_LONGEST = 2000


class PathSegDiffError(Exception):
    """Base of every error that the user can mend.

    The message is one printable line, whatever it repeats of a file: line breaks and control
    characters, which could drive a terminal, are escaped.
    """

    def __init__(self, message: str = "") -> None:
        text = printable(message)
        super().__init__(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...")


class ConfigError(PathSegDiffError):
    """A setting is outside what it can be (unknown tap, timestep outside the schedule, ...)."""


class DataError(PathSegDiffError):
    """An image, mask, manifest or data root is missing, unreadable or contradicts itself."""


class BundleError(PathSegDiffError):
    """A model bundle or a checkpoint is missing, damaged, hostile, or of a shape we do not know."""


class StoreError(PathSegDiffError):
    """A feature store is missing, damaged, incomplete, or was made with other settings."""


class RunError(PathSegDiffError):
    """A run folder is missing, damaged, or its head does not fit what it is asked to read."""


class DivergedError(RunError):
    """The loss of a training is no finite number any more."""


class FetchError(PathSegDiffError):
    """A transfer was refused or broke off, a file is not the expected one, an archive is hostile,
    or the disk is too small."""


def printable(text: str) -> str:
    """The text with everything escaped that is not printable."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
