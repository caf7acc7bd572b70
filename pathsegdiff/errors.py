"""The errors a user can cause; each is one line that names the thing, the value and the remedy.

Every one derives from ``PathSegDiffError``, which the command line turns into one line on stderr
and exit code 1. A bug raises something else and keeps its traceback.
"""


class PathSegDiffError(Exception):
    """Base of every error that the user can mend."""


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
