"""A stand-in for Apple's MPS: tensors of the CPU that name the device mps and lack what MPS lacks."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

MPS = torch.device("mps")
INDEXING = ("__getitem__", "copy_")  # operations on tensors of two devices


class OnMps(Tensor):
    """Refuses float64, pinned memory and operations with tensors of the CPU; has random numbers of its own."""

    random = torch.get_rng_state()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function == Tensor.device.__get__:
            return MPS
        name, given = getattr(function, "__name__", ""), [*args, *(kwargs or {}).values()]
        given += [x for items in given if isinstance(items, list | tuple) for x in items]
        if name in ("double", "pin_memory") or any(x is torch.float64 for x in given):
            raise TypeError(f"{name}: MPS has no float64 and no pinned memory")
        if name not in INDEXING and any(type(x) is Tensor and x.ndim for x in given):
            raise RuntimeError(f"{name}: tensors of cpu and mps")
        if name == "backward":  # it may repeat a forward pass, on tensors of this class
            return function(args[0].as_subclass(Tensor), *args[1:], **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass(), torch.random.fork_rng([]):
            torch.set_rng_state(cls.random)
            found = function(*args, **(kwargs or {}))
            cls.random = torch.get_rng_state()
        return found.as_subclass(Tensor) if name == "cpu" else torch._tensor._convert(found, cls)


class _Factories(TorchFunctionMode):
    """Makes tensors on MPS, and moves tensors there."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        moves = function is Tensor.to and args[1:2] == (MPS,)
        if not moves and kwargs.get("device") != MPS:
            return function(*args, **kwargs)
        found = function(args[0], "cpu", *args[2:]) if moves else function(*args, **kwargs | {"device": "cpu"})
        if found.dtype == torch.float64:
            raise TypeError("MPS has no float64")
        return found if isinstance(found, FakeTensor) else found.as_subclass(OnMps)


@pytest.fixture
def mps(monkeypatch):
    """This machine has MPS and no CUDA."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 2**34)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 2**20)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: OnMps.random)
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: setattr(OnMps, "random", state))
    seeded = torch.Generator().manual_seed
    monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: setattr(OnMps, "random", seeded(seed).get_state()))
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # otherwise a moved parameter keeps its class
    with _Factories():
        yield
    torch.__future__.set_overwrite_module_params_on_conversion(False)
