"""Device, precision and compilation are chosen by what the machine has; what it lacks is refused."""

import re
import shutil
import sys
import weakref
from types import SimpleNamespace as Namespace

import pytest
import torch

from pipeline.config.params import load_params
from pipeline.config.sections import TrainConfig
from pipeline.system import device
from pipeline.system.device import give_back_memory, prepare_machine
from pipeline.system.distributed import World
from pipeline.system.errors import InputError
from pipeline.system.host import uses_gpus


@pytest.fixture
def config(monkeypatch):
    """The committed section `train`, on a machine with a CPU alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    return load_params().section(TrainConfig)


@pytest.mark.parametrize("changes", [{"device": "cuda"}, {"device": "mps"}, {"precision": "fp16"}])
def test_what_the_machine_lacks_is_refused(changes, config):
    with pytest.raises(InputError, match=r"train\.(device|precision)"):
        prepare_machine(config.updated(**changes))


@pytest.mark.parametrize(
    ("cuda", "reason"),
    [
        ({"is_available": False}, "no NVIDIA GPU was found"),
        ({"is_available": False, "smi": True, "build": None}, r"torch .+ is built without CUDA"),
        ({"is_available": False, "smi": True}, "the driver shows no GPU, or is too old for CUDA 13.0"),
        ({"is_available": False, "smi": True, "visible": "-1"}, "no NVIDIA GPU was found"),
        ({"is_available": False, "smi": True, "visible": ""}, "no NVIDIA GPU was found"),
        ({"get_device_capability": (6, 0)}, "GPU 0 has compute capability 6.0, torch is built for sm_75, sm_80"),
        (
            {"get_device_capability": (12, 0), "get_arch_list": ["sm_80", "sm_90"]},
            "capability 12.0, torch is built for sm_80, sm_90",
        ),
        ({"get_device_capability": RuntimeError("No CUDA GPUs are available")}, "does not answer .No CUDA GPUs"),
        ({"device_count": 2, "get_device_capability": {0: (9, 0), 1: (3, 7)}}, None),  # one process uses the first
        ({"mem_get_info": (10**8, 10**10)}, "other programs leave 0.10 GB of GPU memory free"),
        (
            {"mem_get_info": RuntimeError("CUDA error: out of memory\nmore")},
            r"does not answer \(CUDA error: out of memory\)",
        ),
        ({}, None),
        ({"get_device_capability": (12, 0)}, None),  # the kernels of compute_90 are compiled for it
        ({"get_device_capability": (8, 6)}, None),
        ({"get_arch_list": []}, None),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_refused_and_auto_takes_the_cpu(cuda, reason, config, monkeypatch, capsys):
    imitate(cuda, monkeypatch)
    config = config.updated(compile=False, deterministic=False)
    assert prepare_machine(config).device.type == ("cpu" if reason else "cuda")
    if reason:
        said = capsys.readouterr().out
        assert said == "" if "no NVIDIA" in reason else re.search(f"^train.device: using the CPU: .*{reason}", said)
        with pytest.raises(InputError, match=f"train.device: cuda cannot be used, .*{reason}"):
            prepare_machine(config.updated(device="cuda"))


def imitate(cuda, monkeypatch):
    """Replace what torch reports of CUDA."""
    found = {"is_available": True, "device_count": 1, "get_device_capability": (8, 0), "mem_get_info": (10**10, 10**10)}
    found |= {"get_arch_list": ["sm_75", "sm_80", "sm_90a", "compute_90"], "set_device": None}
    for name, value in (found | {"is_bf16_supported": True} | cuda).items():
        if hasattr(torch.cuda, name):
            monkeypatch.setattr(torch.cuda, name, lambda *index, value=value, **__: answer(value, *index))
    monkeypatch.setattr(torch.version, "cuda", cuda.get("build", "13.0"))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(shutil, "which", lambda name: "smi" if cuda.get("smi") and name == "nvidia-smi" else None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", cuda.get("visible", "0"))


def answer(value, *index):
    if isinstance(value, Exception):
        raise value
    return value[index[0]] if isinstance(value, dict) else value


def test_a_run_selects_deterministic_kernels_for_itself_and_tells_whether_it_is_exact(config, monkeypatch):
    from torch._inductor import config as inductor

    imitate({}, monkeypatch)
    monkeypatch.setattr(device, "has_triton", lambda: True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for deterministic in (True, False):
        machine = prepare_machine(config.updated(device="cuda", deterministic=deterministic, compile=True))
        found = machine.exact, torch.are_deterministic_algorithms_enabled(), inductor.deterministic
        assert (machine.compiled, *found) == (True, *[deterministic] * 3)
    machine = prepare_machine(config.updated(device="cpu", deterministic=True, compile=False))
    assert (machine.exact, torch.are_deterministic_algorithms_enabled()) == (True, False)


def test_between_two_runs_caches_compiled_code_and_what_a_cycle_refers_to_are_freed(monkeypatch):
    class Model:
        pass

    calls = []
    for module, name in ((torch.cuda, "empty_cache"), (torch.mps, "empty_cache"), (torch.compiler, "reset")):
        monkeypatch.setattr(module, name, lambda place=module.__name__: calls.append(place))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)
    model = Model()
    model.error, freed = model, weakref.ref(model)
    del model
    give_back_memory()
    assert (freed(), calls) == (None, ["torch.compiler", "torch.cuda", "torch.mps"])
    calls.clear()
    monkeypatch.delitem(sys.modules, "torch._dynamo")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    give_back_memory()
    assert calls == ["torch.cuda"]  # without MPS, torch.mps.empty_cache raises


def test_processes_cannot_share_mps(config, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert (prepare_machine(config).device.type, prepare_machine(config).exact) == ("mps", False)
    assert prepare_machine(config, world=World(0, 2, 0, 2)).device.type == "cpu"
    assert capsys.readouterr().out == "train.device: using the CPU: 2 processes cannot share mps\n"
    with pytest.raises(InputError, match="2 processes cannot share mps: choose auto or cpu"):
        prepare_machine(config.updated(device="mps"), world=World(0, 2, 0, 2))


@pytest.mark.parametrize(
    ("supported", "bf16_s", "auto"), [(True, 0.5, "bf16"), (True, 2, "fp32"), (False, 0.5, "fp32")]
)
def test_auto_takes_bf16_on_a_cpu_that_supports_it_and_is_faster_with_it(supported, bf16_s, auto, config, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(device, "_product_s", {torch.bfloat16: bf16_s, torch.float32: 1}.get)
    assert prepare_machine(config).precision == auto
    if supported:
        assert prepare_machine(config.updated(precision="bf16")).precision == "bf16"
    else:
        with pytest.raises(InputError, match=r"train\.precision: this cpu has no fast bf16"):
            prepare_machine(config.updated(precision="bf16"))


def test_a_product_is_timed_on_one_core_and_the_number_of_threads_is_restored():
    device._product_s.cache_clear()
    threads = torch.get_num_threads()
    assert 2 * 384**3 / 1e13 < device._product_s(torch.float32) < 10  # no core does 10 TFLOP/s
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("asked", "share", "compiled"), [("auto", 0.5, False), ("auto", 1, True), (False, 1, False)])
def test_a_gpu_compiles_long_runs(asked, share, compiled, monkeypatch, capsys):
    monkeypatch.setattr(device, "has_triton", lambda: True)
    assert device._compiled(asked, "cuda", share * device.COMPILE_FLOPS["cuda"]) == compiled
    assert ("long enough to save time by compiling" in capsys.readouterr().out) == compiled


def test_a_cpu_compiles_only_where_set_and_with_a_compiler(config, monkeypatch, capsys):
    config = config.updated(device="cpu")
    for path in ("/usr/bin/c++", None):
        monkeypatch.setattr(device.shutil, "which", lambda name, path=path: path)
        assert not prepare_machine(config, 1e30).compiled
        assert prepare_machine(config.updated(compile=True)).compiled == bool(path)
    assert capsys.readouterr().out == "train.compile: C++ compiler not found: training without compiling\n"


@pytest.mark.parametrize(
    ("cuda", "hip", "expected"), [(None, None, False), ("12.8", None, True), (None, "6.4.43482", True)]
)
def test_torchs_build_is_known_without_its_import(cuda, hip, expected, tmp_path, monkeypatch):
    assert uses_gpus() == (torch.version.cuda is not None or torch.version.hip is not None)
    version = f"cuda: Optional[str] = {cuda!r}\nhip: Optional[str] = {hip!r}\nrocm: Optional[str] = None\n"
    (tmp_path / "version.py").write_text(version)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: Namespace(origin=str(tmp_path / "__init__.py")))
    assert uses_gpus() == expected
