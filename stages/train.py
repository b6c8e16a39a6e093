"""Stage `train`: data/tokens -> models/ and reports/timing.json, tracked in MLflow."""

import sys
from pathlib import Path

from pipeline.system.entrypoint import Parser, run_stage


def main() -> None:
    parser = Parser(prog="python -m stages.train", description=__doc__, allow_abbrev=False)
    parser.add_argument("--elastic", action="store_true", help="resume in another environment, no longer bit for bit")
    parser.add_argument("--params", metavar="DIGEST", help="refuse other parameters than those with this digest")
    arguments = parser.parse_args()

    from pipeline.config.params import load_params
    from pipeline.system.distributed import ALONE, launch, n_nodes, world_here
    from pipeline.training.config import RunConfig
    from pipeline.training.train import run_tracked

    config = RunConfig.of(params := load_params())
    if arguments.params:
        config.require_digest(arguments.params)
    if config.train.processes * n_nodes() > 1 and world_here() == ALONE:
        sys.exit(launch(config.train.processes, "stages.train", sys.argv[1:]))
    run_tracked(params, Path("data"), Path("models"), Path("reports/timing.json"), arguments.elastic)


if __name__ == "__main__":
    run_stage(main)
