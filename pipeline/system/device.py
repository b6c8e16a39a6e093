"""Choose the device, precision, threads and compilation for this machine, and configure torch."""

import ctypes
import gc
import math
import os
import shutil
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch.utils._triton import has_triton

from pipeline.config.sections import TrainConfig
from pipeline.system.distributed import ALONE, World
from pipeline.system.errors import InputError, first_line
from pipeline.system.limits import cores

# Estimated FLOPs of a run from which torch.compile saves more time than it costs. On a CPU it saves none
# (benchmarks/LOG.md).
COMPILE_FLOPS = {"cuda": 3e16}
NO_GPU = "no NVIDIA GPU was found"
CONTEXT_BYTES = 2**29  # GPU memory that CUDA and its kernels need without any tensor, approximately


class Machine(NamedTuple):
    """The device and the settings of a TrainConfig on this machine, with every `auto` resolved."""

    device: torch.device
    precision: Literal["fp32", "bf16", "fp16"]
    threads: int
    compiled: bool = False
    world: World = ALONE
    exact: bool = True  # whether a repeated step gives the same bits

    def autocast(self) -> AbstractContextManager[Any]:
        """A context in which matrix products are done in the run's precision."""
        return autocast_in(self.device.type, self.precision)


def autocast_in(device: str, precision: str) -> AbstractContextManager[Any]:
    """A context in which matrix products are done in `precision`: fp32, bf16 or fp16."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def prepare_machine(config: TrainConfig, run_flops: float = 0, world: World = ALONE) -> Machine:
    """Resolve every `auto` of a TrainConfig, and configure torch for the result.

    `run_flops`, those of the whole run, decide whether to compile. The processes of a `world` share the machine's cores
    and GPUs. Raises InputError if the machine lacks what `config` requires.
    """
    mps, name = torch.backends.mps.is_available(), config.device
    problem = _cuda_problem(world) if name in ("auto", "cuda") else None
    if name == "auto":
        name = "cuda" if problem is None else "mps" if mps and world.size == 1 else "cpu"
        if problem not in (None, NO_GPU):
            print(f"train.device: using the {name.upper()}: {problem}")
        elif mps and name == "cpu":
            print(f"train.device: using the CPU: {world.size} processes cannot share mps")
    elif name == "cuda" and problem is not None:
        raise InputError(f"train.device: cuda cannot be used, {problem}: choose auto or cpu")
    elif name == "mps" and not mps:
        raise InputError("train.device: this machine has no mps: choose auto or cpu")
    elif name == "mps" and world.size > 1:
        raise InputError(f"train.device: {world.size} processes cannot share mps: choose auto or cpu")
    device = torch.device(name) if world.size == 1 or name != "cuda" else torch.device(name, world.local_rank)
    if name == "cuda":
        if world.local_size > (there := torch.cuda.device_count()):
            raise InputError(f"{world.local_size} processes, but {there} GPUs: start one process for each GPU")
        torch.cuda.set_device(world.local_rank)
    threads = max(1, cores() // world.local_size) if config.threads == "auto" else config.threads
    torch.set_num_threads(threads)
    _keep_freed_memory()
    if deterministic := config.deterministic and name == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if deterministic != torch.are_deterministic_algorithms_enabled():  # the call imports torch's compiler, in a second
        torch.use_deterministic_algorithms(deterministic)
    compiled = not config.shard and _compiled(config.compile, name, run_flops)
    exact = deterministic or name == "cpu"  # kernels of MPS add in no fixed order
    return Machine(device, _precision(config.precision, name), threads, compiled, world, exact)


def _cuda_problem(world: World) -> str | None:
    """Why the processes of `world` cannot use CUDA, or None if they can."""
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") is None or os.environ.get(_gpu_variable()) in ("", "-1"):  # all are hidden
            return NO_GPU
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA"
        return f"the driver shows no GPU, or is too old for CUDA {torch.version.cuda}, with which torch is built"
    try:
        for index in range(min(torch.cuda.device_count(), world.local_size)):
            major, minor = torch.cuda.get_device_capability(index)
            if torch.version.hip is None and not _has_code_for(10 * major + minor):
                built_for = ", ".join(torch.cuda.get_arch_list())
                return f"GPU {index} has compute capability {major}.{minor}, torch is built for {built_for}"
        if world.size > 1:  # each process would see another GPU, and all need the same answer
            return None
        free = torch.cuda.mem_get_info()[0]
    except (RuntimeError, torch.cuda.DeferredCudaCallError) as error:
        return f"the GPU does not answer ({first_line(error)})"
    return None if free >= CONTEXT_BYTES else f"other programs leave {free / 1e9:.2f} GB of GPU memory free"


def _has_code_for(capability: int) -> bool:
    """Whether torch has kernels for 75, 80, ...: `sm` runs on newer GPUs of its generation, `compute` on all newer."""
    built_for = [arch.rstrip("af").split("_") for arch in torch.cuda.get_arch_list()]
    return not built_for or any(
        capability >= int(number) and (kind == "compute" or capability // 10 == int(number) // 10)
        for kind, number in built_for
    )


def gpu_ids() -> list[str]:
    """The GPUs that this process may use, each as `use_gpu` takes it."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = os.environ.get(_gpu_variable()) or os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in named.split(",")] if named else [str(index) for index in range(count)]
    parts_of_gpus = count > 0 and names[0].startswith("MIG-")  # CUDA counts only the first one
    return names if parts_of_gpus else names[:count]


def use_gpu(gpu: str) -> None:
    """Let this process see only one of `gpu_ids()`. Call it before CUDA is used."""
    os.environ[_gpu_variable()] = gpu


def _gpu_variable() -> str:
    return "CUDA_VISIBLE_DEVICES" if torch.version.hip is None else "HIP_VISIBLE_DEVICES"


def give_back_memory() -> None:
    """Return freed memory to the system (glibc) and the GPU, between two runs in the same process.

    Compiled code goes too: torch keeps eight variants of a function, and does not compile the next one.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()  # a trial's exception, as Optuna keeps it, refers to itself and to the trial's model
    torch.cuda.empty_cache()  # does nothing where CUDA is not used
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    if hasattr(libc := _libc(), "malloc_trim"):
        libc.malloc_trim(0)


def _keep_freed_memory() -> None:
    """Keep freed memory for the next step, which then has no page faults (glibc)."""
    if hasattr(libc := _libc(), "mallopt"):
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of <malloc.h>
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)


def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform.startswith("linux") else None


def _compiled(asked: Literal["auto"] | bool, device: str, run_flops: float) -> bool:
    """Resolve `auto`; print a message if the compiler is missing, or if `auto` selects compilation."""
    wanted = run_flops >= COMPILE_FLOPS.get(device, math.inf) if asked == "auto" else asked
    if not wanted:
        return False
    if device == "mps":  # what torch has for it is a prototype
        print("train.compile: not on mps: training without compiling")
        return False
    found = has_triton() if device == "cuda" else any(map(shutil.which, ("c++", "g++", "clang++")))
    if not found:
        print(
            f"train.compile: {'triton' if device == 'cuda' else 'C++ compiler'} not found: training without compiling"
        )
    elif asked == "auto":
        print("train.compile: the run is long enough to save time by compiling")
    return found


def _precision(asked: str, device: str) -> Literal["fp32", "bf16", "fp16"]:
    """Resolve `auto`. Raises InputError for a precision that the device does not support."""
    if device == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # without these instructions, bf16 on a CPU is 10 to 100 times slower than fp32
        bf16 = device == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    if asked == "auto":
        # With them, bf16 is four times as fast as fp32 on one chip, and half as fast on another.
        if device == "cpu" and bf16:
            bf16 = _product_s(torch.bfloat16) < _product_s(torch.float32)
        return "bf16" if bf16 else "fp16" if device == "cuda" else "fp32"
    if asked == "bf16" and not bf16:
        raise InputError(f"train.precision: this {device} has no fast bf16: choose auto or fp32")
    if asked == "fp16" and device != "cuda":
        raise InputError(f"train.precision: fp16 is for GPUs, the device is {device}: choose auto")
    return asked  # type: ignore[return-value]


@cache
def _product_s(dtype: torch.dtype) -> float:
    """CPU seconds of a matrix product on one core: the minimum of 12 runs, which other programs affect least."""
    threads, x, times_s = torch.get_num_threads(), torch.ones(384, 384, dtype=dtype), []
    torch.set_num_threads(1)
    for _ in range(12):
        began = time.thread_time()
        x @ x
        times_s.append(time.thread_time() - began)
    torch.set_num_threads(threads)
    return min(times_s)
