"""The start of processes, and what tells that another machine of a training is gone, without starting one."""

import pytest
from torch.distributed.launcher import api

from pipeline.system.distributed import SAVE_S, is_lost_connection, launch


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection closed by peer [10.0.0.6]:2151", True),
        ("[/pytorch/third_party/gloo/pair.cc:534] Read error [10.0.0.6]: Connection reset by peer", True),
        ("NCCL error: remote process exited or there was a network error, NCCL version 2.27.7", True),
        ("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)", False),
    ],
)
def test_a_broken_connection_is_told_from_other_errors(message, lost):
    assert is_lost_connection(RuntimeError(message)) == lost


def test_processes_that_save_after_a_signal_are_not_killed_within_a_day(monkeypatch):
    configs = []
    monkeypatch.setattr(api, "elastic_launch", lambda config, program: configs.append(config) or (lambda *_: None))
    assert launch(2, "m", []) == 0
    assert configs[0].shutdown_timeout == SAVE_S == 24 * 3600
