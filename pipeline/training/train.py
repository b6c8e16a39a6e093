"""The stage `train`: train one run, with its consumers, until it meets its target or uses up its budget."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from pipeline.config.params import Params
from pipeline.data.batches import TrainingData
from pipeline.data.token_files import count_tokens, open_part
from pipeline.data.tokenizer import n_vocab_in
from pipeline.model.published import INIT_FOLDER
from pipeline.system.device import Machine, prepare_machine
from pipeline.system.distributed import joined, world_here
from pipeline.system.errors import InputError
from pipeline.system.host import project_root
from pipeline.system.signals import StopSignals
from pipeline.tracking.descriptions import source_tag
from pipeline.tracking.recorder import OWNER_PID, Recorder
from pipeline.training.config import RunConfig
from pipeline.training.consumers import Checkpoints, Consumer, evaluate, sample
from pipeline.training.forecast import Forecast
from pipeline.training.progress import Progress
from pipeline.training.results import write_results
from pipeline.training.run import Run, open_run


def run_tracked(params: Params, data: Path, models: Path, timing: Path, elastic: bool = False) -> None:
    """Train on `data`/tokens; write the model, run.json and the journal to `models`, and all times to `timing`.

    An `elastic` run resumes from checkpoints of another environment and is marked as inexact. Raises Interrupted after
    a signal, when everything is saved; DivergedError if the loss is not finite; RunLocked if another process trains the
    same run; PeerLost if another process of this training has died.
    """
    config, world = read_config(params, data), world_here()
    if (batch := config.windows.micro_batch_size) % world.size:
        raise InputError(
            f"windows.micro_batch_size {batch} is not divisible by the {world.size} processes: change one of them"
        )
    with joined(world):
        machine = prepare_machine(config.train, config.flops(count_tokens(data / "tokens")), world)
        text = read_data(config, machine, data)
        root = project_root()
        with StopSignals() as stop, open_run(config, machine, text, root / "checkpoints", elastic) as run:
            if run.finished:
                print(f"the run is finished, at step {run.state.step}: no step is left to train")
            elif run.state.step == 0 and world.is_main:
                run.print_changes()
                print(f"starts from step 0 of {run.max_steps}, in {run.folder}")
            if not run.finished or (run.folder / OWNER_PID).is_file():  # MLflow may not have the end of the run yet
                tags = RunConfig.of(params).origin(params) | source_tag(params.values) | run.origin_tags
                with _tracked(run, root, tags) as consumers:
                    if not run.finished:
                        follow(run, stop, *consumers)
            write_results(run, models, data / "tokenizer", timing)


def read_config(params: Params, data: Path) -> RunConfig:
    """The parameters of a run on `data`, with its tokenizer's size and the hash of the weights that it starts from.

    Raises InputError for any fault in them.
    """
    return RunConfig.of(params).sized_for(n_vocab_in(data / "tokenizer")).with_weights(data)


def read_data(config: RunConfig, machine: Machine, data: Path) -> TrainingData:
    """Read the training data. Raises InputError if it is too short for the parameters, or lacks a held-out text."""
    model = config.model
    text = TrainingData.read(
        data / "tokens", data / "tokenizer", config.windows.seq_len, model.n_ids, model.fold_vocab, machine.device
    )
    config.require_length(text.train.size)
    if text.validation is None and (need := config.needs_held_out):
        raise InputError(
            f"{need}, but the held-out text has {len(open_part(data / 'tokens', 'val'))} tokens, needs 2: "
            "raise corpus.val_fraction"
        )
    return replace(text, init=data / INIT_FOLDER if model.init else None)


def follow(run: Run, stop: StopSignals, *others: Consumer) -> None:
    """Take the run's steps until it is finished. After each step evaluate if due, then call all consumers."""
    run.note_resume()
    consumers: list[Consumer] = [run.log, partial(sample, run), *others, Checkpoints(run, stop).save]
    for record in run.steps():
        evaluate(run, record)
        for consume in consumers:
            consume(record)
        if run.finished:
            break


@contextmanager
def _tracked(run: Run, root: Path, tags: dict[str, str]) -> Iterator[list[Consumer]]:
    """Run the recorder and yield the consumers that show progress; only rank 0 has them."""
    if not run.world.is_main:
        yield []
        return
    if cost := Forecast.of_environment():
        tags = tags | cost.tags()
    progress = Progress(run.state.step, run.state.tokens, run.max_steps, run.config.target.loss)
    recorded = run.folder, dict(run.identity), tags, lambda: run.result
    with Recorder(root) as recorder, recorder.recording(*recorded), closing(progress):
        yield [progress.show]
