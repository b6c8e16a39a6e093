"""stage: what every stage script and command shares -> one-line errors, exit codes, an end together with the parent."""

import errno
import os
import re
import signal
import sys
import time
from collections.abc import Callable

from pipeline.system.errors import Interrupted, OutOfSpaceError, PeerLost, PipelineError
from pipeline.system.signals import die_with_dvc

RANK_0_SPEAKS_WITHIN_S = 30


def run_stage(main: Callable[[], None]) -> None:
    """Run `main` and exit with its code; an error that the user can cause is one line on stderr, without traceback."""
    die_with_dvc()
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # of stages/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = exit_code_of(main)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # all is said
    sys.exit(code)


def exit_code_of(main: Callable[[], None]) -> int:
    """Run `main`; return 0, or the event's exit code after printing its line."""
    try:
        main()
    except PipelineError as error:
        line = f"error: {error}"
        if os.environ.get("RANK", "0") == "0" or isinstance(error, OutOfSpaceError | PeerLost):
            print(line, file=sys.stderr)
        elif not isinstance(error, Interrupted):  # a signal stops all of them, and torchrun waits for each
            time.sleep(RANK_0_SPEAKS_WITHIN_S)  # it meets this too, and once it has said so torchrun ends this process
            print(line, file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever read, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # the shell's code for SIGPIPE
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {(error.strerror or str(error)).lower()}: mend it and repeat", file=sys.stderr)
        return 5 if error.errno in (errno.ENOSPC, errno.EDQUOT) else 2
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        print("error: out of memory: close other programs or choose a smaller recipe", file=sys.stderr)
        return 5
    except KeyboardInterrupt:
        print("error: interrupted: run the same command again to repeat it", file=sys.stderr)
        return 130
    return 0


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether it is torch's own, of a GPU or of a CPU."""
    return re.search("out of memory|allocate memory", str(error)) is not None
