"""Why a run does not start from the checkpoint of another one."""

from dataclasses import replace

from pipeline.config.params import load_params
from pipeline.training.config import RunConfig
from pipeline.training.extension import _reason, same_steps
from tests.trainings import ROOT

N_TOKENS = 100_000


def test_a_run_with_other_learning_rates_from_the_first_step_on_is_not_called_the_same(tmp_path):
    config = RunConfig.of(load_params(ROOT / "params.yaml"))
    for optim, words in (
        (
            {"schedule": "linear", "warmup": 0.5},
            "f has other learning rates from the first step on: optim.schedule linear",
        ),
        (
            {"schedule": "linear", "warmup": 9},
            "f took the same steps up to 10, and has no checkpoint of them: optim.schedule",
        ),
    ):
        shorter = config.optim.updated(**optim)
        longer = replace(config, optim=shorter.updated(max_epochs=2 * shorter.max_epochs))
        n_same = same_steps(shorter, longer.optim, config.windows, N_TOKENS)
        assert words in _reason(tmp_path / "f", n_same, shorter, longer, N_TOKENS)
