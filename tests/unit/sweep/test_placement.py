"""Which worker gets which device, on this machine and on Slurm."""

import pytest
import torch

from pipeline.config.params import load_params
from pipeline.config.sections import SlurmConfig, TrainConfig
from pipeline.sweep import placement
from pipeline.sweep.placement import HIDDEN, Placement, place_workers
from pipeline.system.errors import InputError
from tests.studies import ROOT, sweep_config

PARAMS = load_params(ROOT / "params.yaml")


def train_config(**changes):
    return PARAMS.section(TrainConfig).updated(**changes)


def slurm_config(**changes):
    return PARAMS.section(SlurmConfig).updated(**changes)


@pytest.mark.parametrize(
    ("gpus", "device", "workers", "shared", "expected"),
    [
        ("", "auto", "auto", False, [None]),
        ("", "auto", 3, False, [None] * 3),  # they share the cores
        ("0 1", "auto", "auto", False, ["0", "1"]),
        ("0 1", "cuda", 1, False, ["0"]),
        ("0 1", "cuda", 3, True, ["0", "1", "0"]),
        ("0 1", "cpu", 3, False, [None] * 3),
        ("mps", "auto", "auto", False, [None]),
        ("mps", "mps", 2, True, [None] * 2),
        ("mps", "cpu", 2, False, [None] * 2),
        ("0 1", "cuda", 3, False, "3 workers, but 2 GPUs: choose auto"),
        ("MIG-1a", "auto", 2, False, "2 workers, but 1 GPU:"),
        ("mps", "auto", 2, False, "2 workers, but 1 GPU:"),
    ],
)
def test_each_worker_has_a_device_of_its_own(gpus, device, workers, shared, expected, monkeypatch):
    monkeypatch.setattr(placement, "gpu_ids", lambda: [] if gpus == "mps" else gpus.split())
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: gpus == "mps")
    sweep, train = sweep_config(workers=workers, share_devices=shared), train_config(device=device)
    if isinstance(expected, list):
        assert place_workers(sweep, train, None).devices == expected
    else:
        with pytest.raises(InputError, match=expected):
            place_workers(sweep, train, None)


def test_workers_share_the_cores(monkeypatch):
    monkeypatch.setattr(placement, "cores", lambda: 8)
    cpu = train_config(device="cpu")
    assert place_workers(sweep_config(workers=3), cpu, None).threads == 2
    assert place_workers(sweep_config(workers=9), cpu, None).threads == 1
    assert place_workers(sweep_config(workers=3), train_config(device="cpu", threads=5), None).threads == 5


def test_a_worker_on_slurm_has_the_cores_and_the_gpu_of_its_task(monkeypatch):
    monkeypatch.setattr(placement, "require_slurm", lambda slurm: None)
    sweep = sweep_config(workers=2)
    for given, expected in (({}, ([HIDDEN] * 2, 1)), ({"cpus": 4, "gpus": 1}, ([None] * 2, 4))):
        assert place_workers(sweep, train_config(), slurm := slurm_config(**given)) == Placement(*expected, slurm)
    assert place_workers(sweep, train_config(threads=2), slurm).threads == 2


@pytest.mark.parametrize(
    ("sweep", "train", "slurm", "message"),
    [
        ({"workers": "auto"}, {}, {}, "with --on slurm, give --workers N"),
        ({"storage": "sqlite:///optuna.db"}, {}, {}, "several nodes cannot share SQLite: choose journal:///"),
        ({}, {}, {"gpus": 2}, "slurm.gpus 2: a trial trains on one device of one node: give --gpus 1"),
        ({}, {}, {"nodes": 2}, "slurm.nodes 2: .* give --nodes 1"),
        ({}, {"device": "cuda"}, {}, "give --gpus 1"),
    ],
)
def test_what_cannot_run_on_slurm_is_refused_in_one_line(sweep, train, slurm, message, monkeypatch):
    monkeypatch.setattr(placement, "require_slurm", lambda slurm: None)
    with pytest.raises(InputError, match=message) as error:
        place_workers(sweep_config(**{"workers": 2, **sweep}), train_config(**train), slurm_config(**slurm))
    assert "\n" not in str(error.value)
