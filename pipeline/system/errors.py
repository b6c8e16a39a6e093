"""Errors that end a command with one line on stderr and an exit code of their own.

A message reads `<what> <where>: <what to do>`. Exit codes: 0 done, 2 bad input or parameters, 3 data or model fails
its integrity check, 4 loss or gradient not finite, 5 out of disk or memory, 6 another process holds the run, 7 model or
registry missing, 8 target not reached, 130 SIGINT, 143 SIGTERM.
"""


class PipelineError(Exception):
    """Ends the command with one line and `exit_code`; raise one of its subclasses."""

    exit_code = 1


class InputError(PipelineError, ValueError):
    """A parameter, a file or an argument that the user gave is wrong."""

    exit_code = 2


class IntegrityError(PipelineError):
    """A file does not match its manifest or its hash."""

    exit_code = 3


class DivergedError(PipelineError):
    """Loss or gradient is not finite; raised before the update, so that the weights are untouched."""

    exit_code = 4


class OutOfSpaceError(PipelineError):
    """There is not enough disk or memory."""

    exit_code = 5


class RunLocked(PipelineError):  # noqa: N818 (an event, not a fault)
    """Another process holds the run."""

    exit_code = 6


class ModelMissing(PipelineError):  # noqa: N818
    """There is no such model, version or registry."""

    exit_code = 7


class TargetNotReached(PipelineError):  # noqa: N818
    """No trial of a study has reached the target."""

    exit_code = 8


class PeerLost(PipelineError):  # noqa: N818
    """Another process of the same training has died."""


class Pruned(PipelineError):  # noqa: N818
    """A trial was stopped, or spent its budget, before it reached the target."""


class Interrupted(PipelineError):  # noqa: N818
    """A signal asked the run to stop; everything is saved."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number  # the shell's convention
