"""Device, precision and compilation are chosen by what the machine has; what it lacks is refused."""

import pytest
import torch

from pipeline.config.params import load_params
from pipeline.config.sections import TrainConfig
from pipeline.system import device
from pipeline.system.device import prepare_machine
from pipeline.system.errors import InputError


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
    for path in ("/usr/bin/c++", None):
        monkeypatch.setattr(device.shutil, "which", lambda name, path=path: path)
        assert not prepare_machine(config, 1e30).compiled
        assert prepare_machine(config.updated(compile=True)).compiled == bool(path)
    assert capsys.readouterr().out == "train.compile: C++ compiler not found: training without compiling\n"
