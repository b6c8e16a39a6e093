"""A training of several processes that gets a signal or loses a process is resumed with the same bits."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from pipeline.system.distributed import joined, world_here
from pipeline.system.errors import PeerLost
from pipeline.system.files import read_json
from pipeline.tracking.journal import read_steps
from pipeline.training import train as training
from pipeline.training.checkpoint import checkpoint_steps
from tests.trainings import ROOT, STEPS, bits, change, end, epochs, n_steps, output_of, run_folder, start_world, train


def train_and_signal(rank, step, number):
    """Train; the process of this rank sends itself a signal in `step`."""
    evaluate = training.evaluate

    def signalling(run, record):
        if (run.world.rank, record.step) == (rank, step):
            os.kill(os.getpid(), number)
        evaluate(run, record)

    training.evaluate = signalling
    train()


def codes_and_outputs(processes):
    return [end(process) for process in processes], [output_of(process) for process in processes]


def test_a_training_that_gets_a_signal_or_loses_a_process_is_resumed_with_the_same_bits(
    workspace, tmp_path, monkeypatch, capsys
):  # A18
    # three processes: their sums depend on the order, those of two do not
    change(workspace, **{"windows.micro_batch_size": 6, **epochs(workspace, STEPS, 6 * 64)})
    codes, outputs = codes_and_outputs(start_world(3, train))
    assert codes == [0, 0, 0], outputs
    expected = bits()
    assert read_json(Path("models/run.json"))["environment"]["processes"] == 3
    shutil.rmtree("checkpoints")

    codes, outputs = codes_and_outputs(start_world(3, train_and_signal, 1, 4, signal.SIGTERM))
    assert codes == [128 + signal.SIGTERM] * 3, outputs
    assert ["error: SIGTERM at step 4 of 12" in output for output in outputs] == [True, False, False]
    assert checkpoint_steps(run_folder())[0] == n_steps() == 4
    shutil.copytree(workspace, fewer := tmp_path / "fewer")

    codes, outputs = codes_and_outputs(start_world(3, train_and_signal, 1, 8, signal.SIGKILL))
    assert codes == [PeerLost.exit_code, -signal.SIGKILL, PeerLost.exit_code], outputs
    for output in (outputs[0], outputs[2]):  # a slow process may find that the other one has ended, too
        assert re.search(
            r"^error: (rank 0, process \d+, and )?rank 1, process \d+(, and rank 2, process \d+)?, ha(s|ve) died",
            output,
            re.M,
        ), output

    codes, outputs = codes_and_outputs(start_world(3, train))
    assert codes == [0, 0, 0], outputs
    assert "resumes from step 6 of 12" in outputs[0]
    assert bits() == expected

    monkeypatch.chdir(fewer)
    begun = run_folder()
    train(elastic=True)
    said = capsys.readouterr().out
    assert "not exact from here on: processes 3 -> 1 after step 4" in said
    assert "resumes from step 4 of 12" in said
    assert run_folder() == begun
    record = read_json(Path("models/run.json"))
    assert record["inexact"] == ["processes 3 -> 1 after step 4"]
    assert record["environment"]["processes"] == 1
    assert read_steps(Path("models/steps.jsonl")).index.tolist() == list(range(1, STEPS + 1))
    train()  # the run is finished, also for the environment that finished it
    assert "no step is left to train" in capsys.readouterr().out
    assert read_json(Path("models/run.json"))["inexact"] == record["inexact"]


PROGRAM = """
import os, signal
from pipeline.system.entrypoint import run_stage
from pipeline.training import train as training
from tests.faults.test_distributed_faults import train_and_signal
from tests.trainings import Untracked, train

training.Recorder = Untracked
first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
run_stage(lambda: train_and_signal(0, 5, signal.SIGKILL) if first else train())
"""


def test_torchrun_restarts_a_training_whose_rank_0_was_killed(workspace):  # A18
    codes, outputs = codes_and_outputs(start_world(2, train))
    assert codes == [0, 0], outputs
    expected = bits()
    shutil.rmtree("checkpoints")
    Path("program.py").write_text(PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, "--max-restarts", "1", "program.py"], env=environment, capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "resumes from step 3 of 12" in done.stdout
    assert bits() == expected


def lose_rank_1():
    with joined(world := world_here()):
        if world.rank == 1:
            os._exit(9)
        time.sleep(600)  # rank 0 does not communicate, like a process that waits for its GPU


def test_a_process_that_waits_ends_when_another_one_has_died(tmp_path, monkeypatch):  # A18
    monkeypatch.chdir(tmp_path)
    both = start_world(2, lose_rank_1)
    codes, outputs = codes_and_outputs(both)
    assert codes == [PeerLost.exit_code, 9], outputs
    assert f"error: rank 1, process {both[1].pid}, has died: run the same command again to resume" in outputs[0]
