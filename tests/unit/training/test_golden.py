"""The losses of 20 steps equal those in `golden/*.json`, so a change of the numbers is noticed.

After an intended change run `RENEW_GOLDEN=1 pytest tests/unit/training/test_golden.py`, and commit `golden/*.json` with
the reason.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data.batches import Split
from pipeline.data.token_files import Tokens
from pipeline.data.vocab import Vocabulary
from pipeline.system.errors import InputError
from tests.unit.training.test_loop import MODEL, Loop

GOLDEN = Path(__file__).with_name("golden")
STEPS = 20
# Relative. The order of sums depends on the kernels (AVX2, AVX512) and the number of threads. This changes the losses
# by up to 2e-7 in fp32 and 2e-4 in bf16; bf16 differs from fp32 by up to 1e-3. A learning rate that is 1% off changes
# them by 1e-3, which the tolerance of fp32 detects.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-3}


IDS = (np.arange(300) ** 2 % 47 + np.arange(300) % 5).astype(np.uint16)
TEXT = Split(Tokens("text", [IDS], 60), Vocabulary.of(np.bincount(IDS, minlength=60), 60), torch.device("cpu"))


def losses(precision, name):
    """Train a tiny GPT on 300 regular ids, with weight decay, clipping and gradient accumulation, without dropout."""
    optim = {"name": name, "lr": 0.005, "warmup": 3, "weight_decay": 0.1, "max_grad_norm": 0.5, "min_lr_ratio": 0.1}
    optim |= {"muon_lr": 0.02, "momentum": 0.95}
    shape, where = MODEL.updated(n_layer=2), {"precision": precision}
    loop = Loop(STEPS, 4, 2, TEXT, shape=shape, seq_len=16, where=where, schedule="cosine", **optim)
    return [record.loss for record in loop]


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("precision", TOLERANCE)
def test_the_losses_of_20_steps_equal_the_golden_ones(precision, name):
    try:
        found = losses(precision, name)
    except InputError:
        pytest.skip(f"no fast {precision} here")
    path = GOLDEN / f"{precision}-{name}.json"
    if os.environ.get("RENEW_GOLDEN"):
        path.write_text(json.dumps(found, indent=1) + "\n")
    assert found == pytest.approx(json.loads(path.read_text()), rel=TOLERANCE[precision])
