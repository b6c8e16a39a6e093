"""Errors that end a command with one line on stderr and an exit code of their own."""

import errno

DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)  # of an OSError: no room on the disk, or in a limit or a quota

BROKEN_PIPE = 141  # the shell's code for SIGPIPE

# A message has the form `<what> <where>: <what to do>`. docs/reference/exit-codes.md lists the exit codes.


def one_line(error: BaseException) -> str:
    """The message of an error in one line, or its class's name if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class's name if it has no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class PipelineError(Exception):
    """Ends the command with one line and `exit_code`; raise one of its subclasses."""

    exit_code = 1


class InputError(PipelineError, ValueError):
    """A parameter, a file or an argument of the user is invalid."""

    exit_code = 2


class IntegrityError(PipelineError):
    """A file does not match its manifest or its hash."""

    exit_code = 3


class DivergedError(PipelineError):
    """A loss or the gradient is not finite; the checkpoints before are kept."""

    exit_code = 4


class OutOfSpaceError(PipelineError):
    """Disk or memory is not sufficient."""

    exit_code = 5


class RunLocked(PipelineError):  # noqa: N818 (an event, not a fault)
    """Another process has locked the run, or params.yaml."""

    exit_code = 6


class ModelMissing(PipelineError):  # noqa: N818
    """The model, version or registry does not exist."""

    exit_code = 7


class TargetNotReached(PipelineError):  # noqa: N818
    """The run, or each trial of a study, has missed the target."""

    exit_code = 8


class PeerLost(PipelineError):  # noqa: N818
    """Another process of the same training has died."""


class WorkersDied(PipelineError):  # noqa: N818
    """So many workers of a sweep have died that no more are started."""


class Pruned(PipelineError):  # noqa: N818
    """A trial was pruned, or used its budget, before it reached the target."""


class Interrupted(PipelineError):  # noqa: N818
    """A signal stopped the run, which has saved everything."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number  # the shell's convention
