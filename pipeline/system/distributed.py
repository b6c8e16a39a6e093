"""distributed: the processes that torchrun starts -> one world, in which all agree and rank 0 writes.

A process that nobody started so is a world of its own, and everything here does nothing for it. Tensors of a model too
large for one device are DTensors, of which each process holds a shard (FSDP2).
"""

import logging
import os
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from pipeline.system.errors import DivergedError, Interrupted, PeerLost, PipelineError

LOOK_S = 0.25  # between looks at whether the other processes live
GRACE_S = 2.0  # for a process to find out by itself that another one is gone

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes that train one model together; `local` ones are on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, items: list[T]) -> list[T]:
        """This process's own of `items`, whose number is a multiple of the world's."""
        each = len(items) // self.size
        return items[self.rank * each : (self.rank + 1) * each]

    def add(self, x: Tensor) -> Tensor:
        """Put the sum over all processes in place of `x`; return it."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def largest(self, *values: int) -> list[int]:
        """Of each of the values the largest that one of the processes has."""
        if self.size == 1:
            return list(values)
        found = torch.tensor(values)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """The tensors, of one shape and on the CPU, that the processes have, by rank."""
        if self.size == 1:
            return [x]
        found = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(found, x)
        return found

    def on_main(self, work: Callable[[], T]) -> T:
        """Have rank 0 do `work`; return what that returns, or raise the event that it raises, in every process."""
        if self.size == 1:
            return work()
        outcome: list[T | PipelineError | None] = [None]
        if self.is_main:
            try:
                outcome[0] = work()
            except PipelineError as error:
                outcome[0] = error
        dist.broadcast_object_list(outcome, device=torch.device("cpu"))
        if isinstance(outcome[0], PipelineError):
            raise outcome[0]
        return outcome[0]  # type: ignore[return-value]


ALONE = World()


def world_here() -> World:
    """The world that torchrun's variables describe; ALONE where there are none."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ALONE
    return World(*(int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))


@contextmanager
def joined(world: World) -> Iterator[None]:
    """Connect the processes of `world`; rank 0 alone prints, and one that loses another raises PeerLost, or ends."""
    if world.size == 1:
        yield
        return
    _connect(world)
    with _Watch() as watch, redirect_stdout(sys.stdout if world.is_main else None):
        try:
            yield
        except (Interrupted, DivergedError):  # all processes raise them alike
            watch.wait_for_all()
            raise
        except RuntimeError:
            if watch.lost():
                raise PeerLost(watch.message) from None
            raise
        watch.wait_for_all()
    dist.destroy_process_group()


def _connect(world: World) -> None:
    """Meet the others through torchrun's store, where the addresses of a job before its restart still lie."""
    store, _, _ = next(rendezvous("env://"))
    attempt = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=attempt, rank=world.rank, world_size=world.size)


class _Watch:
    """A thread that ends this process when another one of the world, on this machine, is gone.

    A broken connection says so itself, but only on a CPU: a GPU would wait for the dead for minutes.
    """

    def __init__(self) -> None:
        me = (socket.gethostname(), os.getpid())
        everyone: list[tuple[str, int]] = [me] * dist.get_world_size()
        dist.all_gather_object(everyone, me)
        self._others = {rank: pid for rank, (host, pid) in enumerate(everyone) if host == me[0] and pid != me[1]}
        self._left, self._lost, self.message = threading.Event(), threading.Event(), ""

    def __enter__(self) -> Self:
        threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()

    def lost(self) -> bool:
        """Whether another process is gone; the connection may have known it first."""
        return self._lost.wait(4 * LOOK_S)

    def wait_for_all(self) -> None:
        """Return once every process has come here: none is then missed when it ends."""
        dist.all_reduce(torch.zeros(1))

    def _look(self) -> None:
        while not self._left.wait(LOOK_S):
            for rank, pid in self._others.items():
                if not _lives(pid):
                    self.message = f"rank {rank}, process {pid}, is gone: run the same command again to go on"
                    self._lost.set()
                    if not self._left.wait(GRACE_S):
                        print(f"error: {self.message}", file=sys.stderr, flush=True)
                        os._exit(PeerLost.exit_code)
                    return


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def launch(processes: int, module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module` in so many processes on this machine, as torchrun does; return the exit code.

    It is that of the first process to fail; the others are then ended. Raises PeerLost where a signal ended it.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    logging.disable(logging.ERROR)  # the processes themselves say what happened
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise PeerLost(f"{name} ended rank {rank}: run the same command again to go on") from None
        return failure.exitcode
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    finally:
        logging.disable(logging.NOTSET)
    return 0
