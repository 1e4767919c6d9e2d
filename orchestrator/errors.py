"""What can go wrong on the cluster, by name. Every message says who, what and, for a wait, how long."""


class RayfitError(RuntimeError):
    """Base of the errors that end a run with exit code 1."""


class WorkerFailed(RayfitError):  # noqa: N818
    """A worker raised or died."""


class DeadlineExceeded(RayfitError):  # noqa: N818
    """A worker did not answer in time."""


class PlacementFailed(RayfitError):  # noqa: N818
    """The cluster lacks the resources that the configuration asks for."""


class RefitFailed(RayfitError):  # noqa: N818
    """No engine could be brought to a weight version."""


class RunStopped(Exception):  # noqa: N818
    """A signal ended the run before its first step; not a failure."""
