"""Throughput, utilisation and the times in reports/timing.json."""

import torch

from pipeline.config.sections import ModelConfig
from pipeline.system.device import Machine
from pipeline.system.distributed import World
from pipeline.tracking.journal import StepRecord
from pipeline.training.results import flops_per_token, time_report, utilisation

GPT2 = ModelConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257, dropout=0.0, fold_vocab=False)
BF16 = Machine(torch.device("cpu"), "bf16", 1)


def test_flops_per_token_equal_the_formula_for_gpt2():
    weights = 12 * 12 * 768**2 + 50257 * 768  # the blocks' matrices and the head
    assert flops_per_token(GPT2, 50257, 1024) == 6 * weights + 12 * 12 * 768 * 1024


def test_utilisation_is_the_share_of_the_devices_peak_or_unknown():
    assert utilisation(1e6, 10**8, BF16, "cuda NVIDIA H200") == round(1e14 / 989e12, 4)
    assert utilisation(1e6, 10**8, BF16, "cuda NVIDIA A100-SXM4-80GB") == round(1e14 / 312e12, 4)
    for name in ("cpu AVX512", "cuda NVIDIA L40S", "cuda NVIDIA GH200 480GB"):
        assert utilisation(1e6, 10**8, BF16, name) == "unknown"
    four = BF16._replace(world=World(size=4))  # each has a device
    assert utilisation(1e6, 10**8, four, "cuda NVIDIA H200") == round(1e14 / (4 * 989e12), 4)


def test_a_report_has_the_seconds_to_each_rule():
    records = [
        StepRecord(i, 100 * i, loss=1, grad_norm=1, lr=1, train_s=2.0 * i, wall_s=3.0 * i, memory_bytes=9 - i)
        for i in (1, 2)
    ]
    report = time_report(records, {"batch": 1, "corpus": None}, "unknown", 0)
    assert report["tokens_per_s"] == 50.0
    assert report["peak_memory_bytes"] == 8
    assert report["to_target"] == {"batch": {"train_s": 2.0, "wall_s": 3.0}, "corpus": None}
