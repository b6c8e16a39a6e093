"""stage: what every stage script and command shares -> one-line errors, exit codes, an end together with DVC."""

import ctypes
import errno
import os
import re
import signal
import sys
from collections.abc import Callable

from pipeline.errors import PipelineError


def run_stage(main: Callable[[], None]) -> None:
    """Run `main` and exit with its code; an error that the user can cause is one line on stderr, without traceback."""
    die_with_dvc()
    sys.exit(exit_code_of(main))


def exit_code_of(main: Callable[[], None]) -> int:
    """Run `main`; return 0, or the event's exit code after printing its line."""
    try:
        main()
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {(error.strerror or str(error)).lower()}: mend it and repeat", file=sys.stderr)
        return 5 if error.errno in (errno.ENOSPC, errno.EDQUOT) else 2
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise  # only torch's own, of a GPU and of a CPU
        print("error: out of memory: close other programs or choose a smaller recipe", file=sys.stderr)
        return 5
    except KeyboardInterrupt:
        print("error: interrupted: run the same command again to repeat the stage", file=sys.stderr)
        return 130
    return 0


def die_with_dvc() -> None:
    """Have the kernel send SIGTERM to this process when `dvc repro`, its parent, dies (Linux; else nothing happens)."""
    if "DVC_STAGE" not in os.environ or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGTERM)
