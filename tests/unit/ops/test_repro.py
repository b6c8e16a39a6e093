"""`repro`: which stages are due, what is said before and after DVC runs, and the exit code of a missed target."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace as Namespace

import pytest
from fixtures_mlflow import trained_project

from pipeline.__main__ import main
from pipeline.config.params import load_params
from pipeline.config.recipes import write_values
from pipeline.config.sections import CorpusConfig
from pipeline.ops import outcome, repro
from pipeline.system.distributed import World
from pipeline.system.errors import ModelMissing
from pipeline.system.files import write_json
from pipeline.tracking.fingerprint import IDENTITY
from pipeline.training.config import RunConfig
from pipeline.training.forecast import Forecast

ROOT = Path(__file__).parents[3]
ALL = ["download", "tokenizer", "tokenize", "train", "evaluate", "plot", "register"]
OWN = {"corpus.source": "texts/mine.txt", "corpus.sha256": None, "corpus.mirrors": []}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project as after a clone, in which commands run. DVC is not started; `calls` has what it was asked for."""
    for name in ("params.yaml", "dvc.yaml", "docs/showcase/params.yaml", "docs/showcase/corpus.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr(repro, "reproduce", lambda environment, *arguments: calls.append(arguments))
    monkeypatch.setattr(repro, "show_outcome", lambda: calls.append("outcome"))
    cost = Forecast(0.5, 600.0, 60.0, 75.0, 10**9, 10**8)  # 11 minutes, and 45 + 75 seconds
    monkeypatch.setattr(repro, "forecast", lambda *arguments, **options: cost)
    return Namespace(folder=tmp_path, calls=calls)


def status(monkeypatch, changed, code=0, error=""):
    """What `dvc status --json` says; there is a dvc.lock."""
    Path("dvc.lock").touch()
    done = Namespace(returncode=code, stdout=json.dumps(changed), stderr=error)
    monkeypatch.setattr(repro, "run_dvc", lambda *arguments, **options: done)


def tokenized():
    """The files of the stages up to `tokenize` that `repro` reads."""
    write_json(Path("reports/corpus.json"), {"tokens": 5000, "validation_tokens": 0, "distinct_ids": 256})
    Path("data/tokens").mkdir(parents=True)
    Path("data/tokens/manifest.json").write_text("{}")


@pytest.mark.parametrize(
    ("changed", "due"),
    [
        ([], []),
        (["register"], ["register"]),
        (["evaluate"], ["evaluate", "plot", "register"]),  # plot reads position_loss.json
        (["tokenizer"], ALL[1:]),
        (["plot", "download"], ALL),
        (["weights/gpt2.dvc"], []),
    ],
)
def test_a_stage_is_due_if_it_has_changed_or_reads_what_a_due_stage_writes(project, monkeypatch, changed, due):
    status(monkeypatch, {name: ["changed deps"] for name in changed})
    assert repro.due_stages() == due


def test_a_clone_says_what_it_will_do_by_the_text_of_the_showcase(project, capsys):
    assert main(["repro", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"stages      {', '.join(ALL)} are due",
        f"text        {load_params().section(CorpusConfig).source}, of which the first 10% is used, "
        "about 34,219 tokens to train on",
        "model       shakespeare-gpt2: 2 layers of 512, tokenizer gpt2",
        "training    at most 14 epochs, 234 steps of 32 windows of 64 tokens, until the loss is below 0.02 by the rule "
        "sliding",  # 14 * 34,219 / 2,048
        "time        at most 11 min of training on this machine and about 2.0 min for the other stages",
    ]
    assert project.calls == []
    assert main(["repro"]) == 0
    assert project.calls == [(), "outcome"]


def test_an_estimate_follows_the_share_of_the_text_that_is_used_and_held_out(project):
    write_values({"corpus.fraction": 0.4, "corpus.val_fraction": 0.25})
    # Four times the tokens of the showcase, and by Heaps' law twice its 3,951 ids.
    assert repro.size_of_text(load_params(), ALL) == (3 * 34219, 34219, 7902, 50257, False)


def test_the_time_of_an_unknown_text_follows_when_it_is_tokenized(project, monkeypatch, capsys):
    write_values(OWN)
    sizes = [None, repro.Size(5000, 0, 256, 257, False)]
    monkeypatch.setattr(repro, "size_of_text", lambda *_: sizes.pop(0))
    assert main(["repro"]) == 0
    times = [line for line in capsys.readouterr().out.splitlines() if line.startswith("time ")]
    assert times == [
        "time        not known yet: it follows when the text is tokenized",
        "time        at most 11 min of training on this machine and about 2.0 min for the other stages",
    ]
    assert project.calls == [("tokenize",), (), "outcome"]


def test_a_training_that_resumes_takes_the_rest_of_its_time(project, monkeypatch, capsys):
    write_values({**OWN, "corpus.tokenizer": "bytes"})
    tokenized()
    status(monkeypatch, {"train": []})
    monkeypatch.setattr(repro, "n_vocab_in", lambda folder: 257)
    for saved, words in (
        (0, "at most 11 min of training on this machine and"),
        (17, "which resumes from step 17, and"),
    ):
        if saved:  # 35 steps in all: 14 epochs of 5,000 tokens, each with a shorter last step
            config, size = RunConfig.of(load_params()).sized_for(257), 5000
            machine = repro.prepare_machine(config.train, config.flops(size))
            identity = repro.identify(repro.data_sha256(Path("data/tokens")), config.decisive, machine)
            write_json((folder := Path("checkpoints") / identity["fingerprint"]) / IDENTITY, identity)
            (folder / f"step-{saved:08}").mkdir()
            words = f"at most 5.7 min of training on this machine, {words}"
        assert main(["repro", "--dry-run"]) == 0
        assert words in capsys.readouterr().out


def test_the_steps_of_a_sharded_model_are_not_timed_but_its_processes_must_have_the_memory(
    project, monkeypatch, capsys
):
    shards = {"train.shard": True, "train.processes": 2, "train.device": "cpu", "optim.name": "adamw"}
    write_values(OWN | shards | {"windows.micro_batch_size": 4})
    monkeypatch.setattr(repro, "size_of_text", lambda *_: repro.Size(5000, 0, 256, 257, False))
    monkeypatch.setattr(repro, "forecast", lambda *_, **__: pytest.fail("timed"))
    sizes = []
    monkeypatch.setattr(repro, "check_fits", lambda config, vocabulary, machine: sizes.append(machine.world))
    assert main(["repro", "--dry-run"]) == 0
    said = "time        not known: the steps of a sharded model (train.shard) are not timed\n"
    assert capsys.readouterr().out.endswith(said)
    assert sizes == [World(0, 2, 0, 2)]


def test_nothing_is_run_if_nothing_is_due_unless_it_is_forced(project, monkeypatch, capsys):
    tokenized()
    status(monkeypatch, {})
    assert main(["repro"]) == 0
    assert capsys.readouterr().out == "stages      none is due: nothing has changed since the last run\n"
    assert project.calls == ["outcome"]
    assert main(["repro", "--force"]) == 0
    assert project.calls[1:] == [("--force",), "outcome"]


def test_wrong_parameters_and_a_failing_dvc_end_it_before_anything_is_run(project, monkeypatch, capsys):
    status(monkeypatch, {}, code=255, error="ERROR: Unable to acquire lock (PID 7)\n")
    assert main(["repro"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "ERROR: Unable to acquire lock (PID 7)",
        "error: `dvc status` failed, as it says above: fix it and repeat the command. A damaged dvc.lock may be "
        "removed: finished stages then come from DVC's cache",
    ]
    write_values({"target.rule": "best"})
    assert main(["repro"]) == 2
    assert project.calls == []


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A project after `dvc repro`, with the loss that it reached and the parameters of its section `registry`."""

    def make(loss, require_target=True, **results):
        folder = trained_project(tmp_path / f"{loss}", loss)
        shutil.copy(ROOT / "params.yaml", folder)
        monkeypatch.chdir(folder)
        write_values({"registry.require_target": require_target})
        run = json.loads(Path("models/run.json").read_text())
        run["params"]["optim"] = {"max_epochs": 14}
        run["results"] |= {"max_steps": 20} | results
        write_json(Path("models/run.json"), run)
        registered = {"model": "x", "version": "1", "champion": loss < 0.1, "reason": "as judged"}
        write_json(Path("reports/registered.json"), registered | {"next_step": None if loss < 0.1 else "promote it"})
        monkeypatch.setattr(outcome, "_show_sample", lambda label: print(f"{label} writes"))

    return make


def test_a_run_that_reached_its_target_ends_with_the_next_command(finished, monkeypatch, capsys):
    finished(0.09)
    monkeypatch.setattr(outcome, "git", lambda *arguments: f" M {arguments[-1]}")
    outcome.show_outcome()
    assert capsys.readouterr().out.splitlines() == [
        "",
        "reached     loss 0.0900 after 20 steps, 160 tokens (rule sliding, target 0.1)",
        "model       x version 1, champion: as judged",
        "git         dvc.lock has this result and is not committed: leave it, or share the model as "
        "docs/guides/dvc-remote.md says",
        "params      params.yaml differs from the committed one: `git checkout params.yaml` restores that",
        "x version 1 writes",
        "",
        "`make app` serves this model; `totarget generate` continues prompts with it in the terminal",
    ]


@pytest.mark.parametrize(
    ("loss", "aliases", "words"),
    [
        (0.09, {"champion": "1"}, "x version 1, champion: as judged\n"),
        (
            0.09,
            {"champion": "2"},
            "x version 1, version 2 is champion\nnext        the page and",
        ),
        (0.09, {}, "x version 1, no champion\nnext        there is no champion yet"),
        (0.3, {"champion": "1"}, "x version 1, champion: as before\n"),
    ],
)
def test_what_the_store_says_now_is_shown_if_the_stage_register_was_skipped(
    finished, monkeypatch, capsys, loss, aliases, words
):
    finished(loss, require_target=False)
    os.utime("reports/registered.json", (1, 1))
    monkeypatch.setattr(outcome, "open_registry", lambda _: None)
    monkeypatch.setattr(outcome, "aliases_of", lambda *_: aliases)
    monkeypatch.setattr(outcome, "find_version", lambda *_: None)
    outcome.show_outcome()
    said = capsys.readouterr().out
    assert words in said
    assert ("`make app` serves this model" in said) == (aliases.get("champion") == "1")


@pytest.mark.parametrize("answers", [False, True])
def test_a_model_that_the_store_lacks_is_registered_again_but_not_in_a_store_that_is_down(
    finished, monkeypatch, capsys, answers
):
    def reproduce(_, *arguments):
        calls.append(arguments)
        registered = json.loads(outcome.REGISTERED.read_text())
        write_json(outcome.REGISTERED, registered | {"version": "7"})

    def missing(_):
        raise ModelMissing("no version") from (None if answers else OSError("down"))

    finished(0.09)
    os.utime("reports/registered.json", (1, 1))
    calls = []
    monkeypatch.setattr(outcome, "reproduce", reproduce)
    monkeypatch.setattr(outcome, "open_registry", missing)
    outcome.show_outcome()
    said = capsys.readouterr()
    assert calls == [("--force", "--single-item", "register")] * answers
    assert f"x version {7 if answers else 1}, champion: as judged" in said.out
    assert said.err == ("" if answers else "warning: no version\n")


@pytest.mark.parametrize(
    ("results", "given", "words"),
    [
        ({}, None, "set optim.max_epochs to 28 in params.yaml, and run `totarget repro`"),
        ({}, "train longer", "train longer"),
        ({"max_steps": 30}, None, "promote it"),  # early stopping has ended it
    ],
)
def test_a_missed_target_is_an_error_with_what_to_do(finished, monkeypatch, capsys, results, given, words):
    finished(0.3, **results)
    monkeypatch.setattr(repro, "due_stages", list)
    monkeypatch.setattr(repro, "show_outcome", lambda: outcome.show_outcome(given))
    shutil.copy(ROOT / "dvc.yaml", "dvc.yaml")
    assert main(["repro"]) == 8
    out, err = capsys.readouterr()
    assert "not reached loss 0.3000 after 20 steps" in out
    assert err == f"error: target 0.1 not reached, the loss is 0.3000 after 20 steps, 160 tokens: {words}\n"


def test_the_best_model_is_no_missed_target_where_none_is_required(finished, capsys):
    finished(0.3, require_target=False)
    outcome.show_outcome()
    said = capsys.readouterr().out
    assert "best        loss 0.3000 after 20 steps, 160 tokens (rule sliding)" in said
    assert "next        promote it" in said
