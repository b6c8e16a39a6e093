"""Search for the learning rate and batch size that reach a loss with the fewest examples.

Each seed's study is run without a pruner and with ExtrapolationPruner. The learning curves are
those of SGD on a noisy quadratic (Zhang et al., 2019), in closed form. A large batch wastes
examples. A high learning rate is fast at first, and ends at a higher loss.

Needs ``pip install optunahub``.
"""

from pathlib import Path

import numpy as np
import optuna
import optunahub


TARGET = 0.15  # loss
BUDGET = 3_000  # examples, at most, in a trial
INTERVAL = 20  # examples between reports
CURVATURE = 1 / np.arange(1, 101)  # eigenvalues of the Hessian, and of the gradients' covariance


def loss_after(steps: int, lr: float, batch_size: int) -> float:
    """Expected loss of SGD that starts at distance 1 from the minimum in each direction."""
    kept = (1 - lr * CURVATURE) ** (2 * steps)
    noise = lr / (
        batch_size * (2 - lr * CURVATURE)
    )  # what is left of a squared distance at the end
    return float(0.5 * np.sum(CURVATURE * (kept + (1 - kept) * noise)))


def objective(trial: optuna.Trial) -> int:
    lr = trial.suggest_float("lr", 0.01, 1.9, log=True)
    batch_size = trial.suggest_int("batch_size", 1, 64, log=True)
    for examples in range(INTERVAL, BUDGET + 1, INTERVAL):
        loss = loss_after(examples // batch_size, lr, batch_size)
        trial.report(loss, step=examples)
        if loss <= TARGET:
            return examples
        if trial.should_prune():
            break
    raise optuna.TrialPruned


def run(pruner: optuna.pruners.BasePruner, seed: int, n_trials: int = 40) -> tuple[float, int]:
    """The best trial's cost, and the cost of all trials, both in examples."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed), pruner=pruner)
    study.optimize(objective, n_trials=n_trials)
    return study.best_value, sum(trial.last_step or 0 for trial in study.trials)


def main() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    package = optunahub.load_local_module(
        "pruners/extrapolation", registry_root=str(Path(__file__).parents[2])
    )
    print("seed  best without, with the pruner  all trials without, with the pruner")
    for seed in range(5):
        best, cost = run(optuna.pruners.NopPruner(), seed)
        best_pruned, cost_pruned = run(package.ExtrapolationPruner(), seed)
        print(f"{seed:4} {best:13,.0f} {best_pruned:16,.0f} {cost:19,} {cost_pruned:16,}")


if __name__ == "__main__":
    main()
