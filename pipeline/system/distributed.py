"""Communication between the processes that train one model, which torchrun starts."""

import logging
import os
import re
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import psutil
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from pipeline.system.errors import DivergedError, Interrupted, PeerLost, PipelineError

POLL_S = 0.25  # between two checks that the other processes are alive
MEET_S = 600  # time in which all machines of a training must have started
SAVE_S = 86_400  # time in which the processes may save after a signal, before they are killed; Slurm ends a job before
GRACE_S = 2.0  # time in which the process may end by itself after another one has died

T = TypeVar("T")
Some = TypeVar("Some", list[Any], NDArray[Any])


@dataclass(frozen=True)
class World:
    """The processes that train one model; `local_...` counts those on this machine.

    In a world of one process, the methods return their arguments without communication.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, items: Some) -> Some:
        """This process's part of `items`, whose number must be a multiple of the world's size."""
        each = len(items) // self.size
        return items[self.rank * each : (self.rank + 1) * each]

    def add(self, x: Tensor) -> Tensor:
        """Replace `x` by its sum over all processes, and return it."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def largest(self, *values: int) -> list[int]:
        """The maximum of each value over all processes."""
        if self.size == 1:
            return list(values)
        found = torch.tensor(values)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """The tensors of all processes in the order of ranks; they have one shape and are on the CPU."""
        if self.size == 1:
            return [x]
        found = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(found, x)
        return found

    def on_main(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0; every process returns its result or raises its PipelineError."""
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
    """The world that torchrun's environment variables describe; ALONE without them."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ALONE
    return World(*(int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))


@contextmanager
def joined(world: World) -> Iterator[None]:
    """Connect the processes of `world`. Only rank 0 prints. Raises PeerLost if another process dies."""
    if world.size == 1:
        yield
        return
    # torchrun's store. After a restart it still has the addresses of the previous attempt.
    store, _, _ = next(rendezvous("env://"))
    attempt = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=attempt, rank=world.rank, world_size=world.size)
    with _Watch() as watch, redirect_stdout(sys.stdout if world.is_main else None):
        try:
            yield
        except (Interrupted, DivergedError):  # every process raises the same error
            watch.wait_for_all()
            raise
        except RuntimeError as error:
            if watch.lost.wait(4 * POLL_S):  # the connection may break before the watch finds the dead process
                raise PeerLost(watch.message) from None
            if world.size > world.local_size and is_lost_connection(error):
                raise PeerLost(
                    "another machine of this training is gone: run the same command again to resume"
                ) from None
            raise
        watch.wait_for_all()
    dist.destroy_process_group()


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether Gloo or NCCL raised `error` because a process on another machine is gone."""
    return re.search("onnection (closed|reset) by peer|roken pipe|remote process exited", str(error)) is not None


class _Watch:
    """A thread that ends this process when another process of the world on this machine has died.

    On a CPU a broken connection raises an error by itself; a GPU would wait for the dead process for minutes.
    """

    def __init__(self) -> None:
        me = (socket.gethostname(), os.getpid())
        everyone: list[tuple[str, int]] = [me] * dist.get_world_size()
        dist.all_gather_object(everyone, me)
        self._others = {rank: pid for rank, (host, pid) in enumerate(everyone) if host == me[0] and pid != me[1]}
        self._left, self.lost, self.message = threading.Event(), threading.Event(), ""

    def __enter__(self) -> Self:
        threading.Thread(target=self._poll, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._left.set()

    def wait_for_all(self) -> None:
        """Wait until every process calls this, so that a process that ends first is not reported as dead."""
        dist.all_reduce(torch.zeros(1))

    def _poll(self) -> None:
        while not self._left.wait(POLL_S):
            dead = [f"rank {rank}, process {pid}" for rank, pid in self._others.items() if not psutil.pid_exists(pid)]
            if dead:  # of several, one has died and the others have noticed it before this process
                died = "has died" if len(dead) == 1 else "have died"
                self.message = f"{', and '.join(dead)}, {died}: run the same command again to resume"
                self.lost.set()
                if not self._left.wait(GRACE_S):
                    print(f"error: {self.message}", file=sys.stderr, flush=True)
                    os._exit(PeerLost.exit_code)
                return


def n_nodes() -> int:
    """The number of machines of this training, which are started with torchrun's environment variables PET_..."""
    return int(os.environ.get("PET_NNODES", "1"))


def launch(processes: int, module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module` in several processes on this machine, as torchrun does, and on others at the same time.

    On several machines, PET_NNODES, PET_NODE_RANK, PET_RDZV_ENDPOINT and PET_RDZV_ID say how they find each other; the
    machine of rank 0 has the endpoint. If one process fails, end the others and return its exit code. Raises PeerLost
    if a signal ended it, or if the machines do not meet.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    endpoint, first = os.environ.get("PET_RDZV_ENDPOINT", "localhost:0"), os.environ.get("PET_NODE_RANK", "0") == "0"
    config = LaunchConfig(
        min_nodes=(nodes := n_nodes()),
        max_nodes=nodes,
        nproc_per_node=processes,
        run_id=os.environ.get("PET_RDZV_ID") or str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        rdzv_configs={"is_host": first, "timeout": MEET_S, "read_timeout": MEET_S},
        # the others reach this address, which is not always so for the host's own name
        local_addr=endpoint.rpartition(":")[0] if first and nodes > 1 else None,
        max_restarts=0,
        shutdown_timeout=SAVE_S,
    )
    logging.disable(logging.ERROR)  # the processes report their errors themselves
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise PeerLost(f"{name} ended rank {rank}: run the same command again to resume") from None
        return failure.exitcode
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except RendezvousError as error:
        raise PeerLost(
            f"the {nodes} machines did not meet at {endpoint} ({error}): run the same command again"
        ) from None
    finally:
        logging.disable(logging.NOTSET)
    return 0
