"""Device, precision, threads and compiler: what is there is taken, what is not is refused or told."""

import pytest
import torch

from pipeline.config.params import load_params
from pipeline.config.sections import TrainConfig
from pipeline.system import device as machine
from pipeline.system.device import prepare_machine
from pipeline.system.errors import InputError


@pytest.mark.parametrize("changes", [{"device": "cuda"}, {"device": "mps"}, {"precision": "fp16"}])
def test_what_the_machine_lacks_is_refused_in_a_line(changes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"train\.(device|precision)"):
        prepare_machine(load_params().section(TrainConfig).updated(**changes))


def test_bf16_is_taken_only_where_the_chip_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "_product_s", {torch.bfloat16: 1, torch.float32: 4}.get)
    for has_it, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has_it=has_it: has_it)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert prepare_machine(load_params().section(TrainConfig).updated(device="cpu")).precision == precision
    with pytest.raises(InputError, match=r"train\.precision: this cpu has no fast bf16"):
        prepare_machine(load_params().section(TrainConfig).updated(device="cpu", precision="bf16"))


def test_bf16_is_not_taken_where_the_chip_has_it_and_fp32_is_faster(monkeypatch):
    config = load_params().section(TrainConfig).updated(device="cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(machine, "_product_s", {torch.bfloat16: 2, torch.float32: 1}.get)
    assert prepare_machine(config).precision == "fp32"
    assert prepare_machine(config.updated(precision="bf16")).precision == "bf16"  # as one may ask for


def test_a_product_is_timed_on_one_core_and_the_threads_stay_as_they_were():
    machine._product_s.cache_clear()
    threads = torch.get_num_threads()
    assert 2 * 384**3 / 1e13 < machine._product_s(torch.float32) < 10  # no core does 10 TFLOP/s
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("asked", "share", "compiled"), [("auto", 0.5, False), ("auto", 1, True), (False, 1, False)])
def test_compiling_on_a_gpu_is_chosen_by_the_length_of_the_run(asked, share, compiled, monkeypatch, capsys):
    monkeypatch.setattr(machine, "has_triton", lambda: True)
    assert machine._compiled(asked, "cuda", share * machine.COMPILE_FLOPS["cuda"]) == compiled
    assert ("long enough for compiling to pay" in capsys.readouterr().out) == compiled


def test_a_cpu_compiles_only_when_told_to(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/usr/bin/{name}")
    config = load_params().section(TrainConfig).updated(device="cpu")
    assert not prepare_machine(config, 1e30).compiled
    assert prepare_machine(config.updated(compile=True)).compiled


def test_without_a_compiler_training_goes_on_with_a_line(monkeypatch, capsys):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert not prepare_machine(load_params().section(TrainConfig).updated(device="cpu", compile=True)).compiled
    assert "no C++ compiler here: training without it" in capsys.readouterr().out
