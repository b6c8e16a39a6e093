"""`plan` and `learn --dry-run`: what they say of a text, what they refuse, and that they write nothing."""

import os
import random
import shutil
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.config.params import load_params
from pipeline.config.recipes import write_values
from pipeline.config.sections import CorpusConfig
from pipeline.data import corpus
from pipeline.data.corpus import fetch_corpus
from pipeline.ops import learn, plan
from pipeline.ops.params_check import check_params
from pipeline.ops.plan import Options, make_plan
from pipeline.ops.sources import bring, find_source, find_weights
from pipeline.system.errors import InputError
from pipeline.system.files import read_json
from pipeline.system.words import duration
from pipeline.training.forecast import Forecast
from tests.small_models import save_published

ROOT = Path(__file__).parents[3]
ENGLISH = "I went to the market and bought a bag of rice, then we cooked dinner for {} people.\n"


def forecast_of(config, machine, vocabulary, n_tokens, n_held_out=0):
    """A step takes a nanosecond for each parameter of the blocks and token: no step is timed in these tests."""
    step_s = 1e-9 * 12 * config.model.n_layer * config.model.n_embd**2 * config.windows.step_tokens
    return Forecast(step_s, step_s * config.optim.max_steps(config.windows, n_tokens), 1.0, 1.0, 10**9, 10**8)


@pytest.fixture
def project(tmp_path, monkeypatch, bpe):
    """A project's folder with GPT-2's tokenizer, in which commands run, and a folder with texts beside it."""
    (folder := tmp_path / "project").mkdir()
    shutil.copy(ROOT / "params.yaml", folder)
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    shutil.copytree(bpe, folder / "data" / "tokenizer")
    (folder / "texts").mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(plan, "forecast", forecast_of)
    random.seed(1)
    texts = {
        "diary.txt": "".join(ENGLISH.format(i * i) for i in range(300)),
        "empty.txt": "",
        "blank.txt": " \n\n",
        "tiny.txt": "hi",
        "half.txt": ENGLISH[:32],
        "log.txt": "".join(f"{'ab'[random.random() < 0.5]} is all that differs in this log, " for _ in range(4_000)),
        "json.txt": '{"text": "a record"}\n',
        "pointer.txt": "version https://git-lfs.github.com/spec/v1\noid sha256:abc\n",
        "pointer.dvc": "outs:\n- md5: x\n",
        "page.pdf": "%PDF-1.4",
        "table.csv": "id,text\n1,hello\n",
        "poems.csv": "id,title,poem\n1,a,hello\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "binary.txt").write_bytes(b"\0\1\xff\xfe")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n")
    return folder


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def command(project, capsys):
    """Runs a command that must write nothing; returns its exit code, its output and its messages on stderr."""

    def call(*arguments):
        before = snapshot(project.parent)
        code = main(arguments)
        assert snapshot(project.parent) == before
        return code, *capsys.readouterr()

    return call


def test_plan_and_dry_run_say_what_would_be_trained_and_why(command):
    code, said, _ = command("plan", "../diary.txt")
    assert code == 0
    lines = dict(line.split(" ", 1) for line in said.splitlines())
    assert lines["text"].split(": ", 1)[1].startswith(f"{Path('../diary.txt').stat().st_size:,} bytes, ")
    assert lines["tokenizer"].split() == "gpt2: 3.9 bytes of this text a token".split()
    assert "2 layers of 128" in lines["model"]
    assert "(3.6 a parameter)" in lines["model"]
    assert "until its loss from anywhere in the text is below 0.1" in lines["training"]
    assert lines["space"].strip() == "1 GB of memory, 100 MB of disk"
    assert lines["name"].split()[0] == "diary,"
    assert command("learn", "../diary.txt", "--dry-run") == (0, said, "")


def test_the_memory_is_that_of_all_processes_which_share_a_cpu(command, project):
    write_values({"train.processes": 2})
    assert "space       2 GB of memory, 100 MB of disk\n" in command("plan", "../diary.txt")[1]


def test_a_text_that_repeats_its_passages_gets_more_epochs_and_the_plan_says_so(project, tmp_path):
    found = {}
    for name, numbers in (("plain", range(1000)), ("repeated", [n * n % 40 for n in range(1000)])):
        Path(f"../{name}.txt").write_text("".join(f"{n} is {n * 7919 % 997} and then {n % 10}\n" for n in numbers))
        made = make_plan(find_source(f"../{name}.txt", None), Options(target=3.0), tmp_path)
        found[name] = made.values["optim.max_epochs"], "since the text repeats its passages" in made.lines["training"]
    (few, noted), (many, also_noted) = found.values()
    assert many > 1.5 * few
    assert (noted, also_noted) == (False, True)


def test_the_column_of_a_table_is_named_and_other_texts_have_none(command):
    Path("../mails.csv").write_text("id,body\n" + "".join(f'{n},"{ENGLISH[:-1]}"\n' for n in range(30)))
    assert "different ones; rows of the column 'body': 30\n" in command("plan", "../mails.csv")[1]
    code, _, said = command("plan", "../diary.txt", "--column", "body")
    assert (code, said.count("\n")) == (2, 1)
    assert "error: --column body: " in said
    assert "diary.txt has no table: leave --column out" in said


def test_a_remote_text_is_reported_by_its_source(command, monkeypatch):
    monkeypatch.setattr(corpus, "fetch", lambda sources, *_: (sources[0], {sources[0]: Path("../diary.txt")}))
    size = Path("../diary.txt").stat().st_size
    code, said, messages = command("plan", "https://example.com/diary.txt")
    assert (code, messages) == (0, f"https://example.com/diary.txt: {size:,} bytes\n")
    assert f"https://example.com/diary.txt: {size:,} bytes, " in said


def test_a_remote_text_is_downloaded_once_also_if_it_has_changed(project, tmp_path, monkeypatch):
    url, downloads, calls = "https://example.com/diary.txt", [], []

    def fetch(sources, *_):
        downloads.append(sources)
        return url, {url: tmp_path / "diary.txt"}

    def reproduce(environment, *arguments):
        calls.append(arguments)
        if arguments:  # the stage `download`
            with monkeypatch.context() as stage:
                stage.setenv(corpus.VARIABLE, environment[corpus.VARIABLE])
                fetch_corpus(load_params().section(CorpusConfig), Path("data/corpus.txt"))

    monkeypatch.setattr(corpus, "fetch", fetch)
    monkeypatch.setattr(learn, "reproduce", reproduce)
    monkeypatch.setattr(learn, "_reached", lambda: True)
    monkeypatch.setattr(learn, "show_outcome", lambda next_step: None)
    download = ("--force", "--single-item", "download")
    for n, expected in ((1, [download, ()]), (2, [()]), (3, [download, ()])):
        if n == 3:
            (tmp_path / "diary.txt").write_text(ENGLISH.format("few") * 200)
        calls.clear()
        assert main(["learn", url, "--yes"]) == 0
        assert (len(downloads), calls) == (n, expected)
        assert Path("data/corpus.txt").read_bytes() == (tmp_path / "diary.txt").read_bytes()


def test_a_plan_is_valid_for_every_goal_and_size(project, tmp_path):
    for options in (
        Options(),
        Options(goal="generalise"),
        Options(goal="generalise", target=3.0),
        Options(goal="generalise", size="shakespeare-char", tokenizer="bytes"),
        Options(size="laptop-full"),
        Options(tokenizer="bpe:300"),
    ):
        made = make_plan(find_source("../diary.txt", None), options, tmp_path)
        shutil.copy(ROOT / "params.yaml", "params.yaml")
        write_values(made.values)
        check_params(load_params())
        learned = load_params().values
        space, step = learned["sweep"]["space"], made.values["windows.micro_batch_size"] * learned["windows"]["seq_len"]
        assert step in space["windows"]["step_tokens"]
        for key in ("lr", "muon_lr", "max_epochs"):
            assert space["optim"][key]["low"] < learned["optim"][key] < space["optim"][key]["high"]
        assert learned["corpus"]["source"] == "texts/diary.txt"
        assert learned["registry"]["model"] == "diary"
        assert learned["registry"]["replace_champion"]
        assert learned["registry"]["require_target"] == (options.goal != "generalise" or options.target is not None)
        assert learned["samples"]["prompts"] is learned["corpus"]["sha256"] is None
        assert learned["target"]["rule"] == ("validation" if options.goal == "generalise" else "sliding")
        assert learned["model"]["n_layer"] == {"laptop-full": 3, "shakespeare-char": 6}.get(options.size, 2)
        assert learned["corpus"]["tokenizer"] == (options.tokenizer or "gpt2")
        assert "# when the training stops" in Path("params.yaml").read_text()  # comments are kept


def test_a_time_limits_the_text_and_the_plan_says_so(command, project, tmp_path):
    Path("../long.txt").write_text("".join(ENGLISH.format(i * i * i) for i in range(4_000)))
    _, said, _ = command("plan", "../long.txt", "--time", "90s")
    assert "of which the first " in said
    assert "the rest of the text is too large for 90 s" in said
    made = make_plan(find_source("../long.txt", None), Options(time_s=90), tmp_path)
    assert 0 < made.values["corpus.fraction"] < 0.5
    assert made.cost.train_s + made.cost.evaluation_s + made.cost.evaluate_s + plan.policy.FIXED_S <= 90
    whole = make_plan(find_source("../long.txt", None), Options(time_s=1e6), tmp_path)
    assert whole.values["corpus.fraction"] == 1.0
    assert command("plan", "../long.txt", "--time", "10s")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["../missing.txt"], "../missing.txt not found: give a file"),
        (["../empty.txt"], "empty.txt contains no text"),
        (["../blank.txt"], "blank.txt contains no text"),
        (["../tiny.txt"], "the text has 1 tokens, too few for a window (33 are needed): give more text"),
        (["../half.txt", "--tokenizer", "bytes"], "has 32 tokens, too few for a window (33 are needed): give more"),
        (["../half.txt", "--size", "laptop"], "(65 are needed): give more text or another --size"),
        (["../binary.txt"], "is not UTF-8 at byte 2"),
        (["../picture.png"], "is an image"),
        (["../page.pdf"], "is a PDF"),
        (["../pointer.txt"], "is a Git LFS pointer"),
        (["../pointer.dvc"], "is DVC's pointer"),
        (["../json.txt"], "is JSON: save it as JSON Lines"),
        (["../table.csv", "--column", "body"], "has no column 'body': set --column to one of 'text'\n"),
        (["../poems.csv"], "has no column 'text': set --column to one of 'title', 'poem'"),
        (["../diary.txt", "../log.txt"], "2 sources: name one"),
        (["../diary.txt", "--tokenizer", "gpt3"], "error: --tokenizer: unknown tokenizer 'gpt3'"),
        (["../diary.txt", "--tokenizer", "bpe:10"], "'bpe:10' is not bpe:N"),
        (["../diary.txt", "--tokenizer", "bpe:10000000"], "'bpe:10000000' is not bpe:N"),
        (["../diary.txt", "--tokenizer", "bpe:60000"], "no more than"),
        (["../diary.txt", "--target", "0"], "give a loss above 0"),
        (["../log.txt", "--target", "0.0001"], "is not possible: the text repeats itself"),
        (["../diary.txt", "--goal", "generalise", "--target", "0.0001"], "the text is too small for it"),
        (["../diary.txt", "--time", "soon"], "give a time such as"),
        (["../diary.txt", "--size", "lapto"], "no recipe lapto"),
        (["../diary.txt", "--name", "shakespeare-gpt2"], "belongs to the text https://"),
        (
            ["file:///tmp/shakespeare-gpt2.txt"],
            "error: SOURCE: a source is a URL (https), ",
        ),  # not that it has the name
        (["ftp://example.com/a.txt"], "error: SOURCE: a source is a URL"),
        (["../*.md"], "matches no file: add texts or set another SOURCE"),
    ],
)
def test_a_text_or_an_option_that_is_not_possible_is_refused_in_one_line(command, arguments, words):
    code, said, error = command("learn", *arguments, "--yes")
    assert (code, said) == (2, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error


def test_a_name_or_a_copy_of_another_text_is_refused_and_a_stored_plan_is_used_again(
    project, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(learn, "reproduce", lambda environment: None)
    monkeypatch.setattr(learn, "_reached", lambda: True)
    monkeypatch.setattr(learn, "show_outcome", lambda next_step: None)
    before = Path("params.yaml").read_bytes()
    assert main(["learn", "../diary.txt"]) == 0  # without a terminal it does not ask
    written = snapshot(project)
    (copy,) = Path("plans").glob("params-*.yaml")
    assert copy.read_bytes() == before
    assert "corpus.fraction: 0.1 -> 1.0" in capsys.readouterr().out
    monkeypatch.setattr(plan, "forecast", None)  # nothing is measured again
    assert main(["learn", "../diary.txt"]) == main(["learn", "texts/diary.txt"]) == 0
    assert {path: text for path, text in snapshot(project).items() if path.suffix != ".json"} == {
        path: text for path, text in written.items() if path.suffix != ".json"
    }
    monkeypatch.setattr(plan, "forecast", forecast_of)
    for given, name, words in [
        ("../log.txt", "diary", "the model name diary belongs to the text "),
        ("../table.csv", "diary", "the model name diary belongs to the text "),
    ]:
        with pytest.raises(InputError, match=words):
            make_plan(find_source(given, name), Options(), tmp_path)
    Path("texts/log.txt").write_text("mine")
    with pytest.raises(InputError, match=r"texts/log.txt is another text than"):
        make_plan(find_source("../log.txt", None), Options(), tmp_path)
    Path("../diary.txt").write_text(Path("../diary.txt").read_text() + ENGLISH.format("many"))
    assert main(["learn", "../diary.txt"]) == 0  # the diary has grown: the copy follows
    assert Path("texts/diary.txt").read_text() == Path("../diary.txt").read_text()


@pytest.mark.parametrize("section", ["corpus", "optim", "sweep", "target"])
def test_an_empty_section_of_params_yaml_is_named(command, section):
    lines, kept = Path("params.yaml").read_text().splitlines(keepends=True), True
    for n, line in enumerate(lines):
        kept = (line.startswith(" ") and kept) or not line.startswith((" ", f"{section}:"))
        if not kept and line.startswith(" "):
            lines[n] = f"#{line}"
    Path("params.yaml").write_text("".join(lines))
    assert command("plan", "../diary.txt") == (2, "", f"error: params.yaml: {section}: section missing\n")


def test_a_text_by_another_spelling_of_its_path_is_the_same_text(project, tmp_path):
    (tmp_path / "alias").symlink_to(tmp_path)
    made = make_plan(find_source("../diary.txt", None), Options(), tmp_path)
    learn._store(made, {})
    assert make_plan(find_source("../alias/diary.txt", None), Options(), tmp_path).values == made.values
    with pytest.raises(InputError, match="the model name diary belongs to the text"):
        make_plan(find_source("../alias/log.txt", "diary"), Options(), tmp_path)


def test_a_text_that_was_moved_is_the_same_text_while_it_is_equal_to_its_copy(project, tmp_path):
    def planned(given, name):
        return make_plan(find_source(given, name), Options(), tmp_path)

    def learned(given, name):
        made = planned(given, name)
        learn._store(made, bring(made.source, in_place=False))

    learned("../diary.txt", None)
    shutil.move("../diary.txt", "../old.txt")
    assert planned("../old.txt", "diary").source.source == "texts/diary.txt"
    Path("../old.txt").write_text(ENGLISH * 99)
    with pytest.raises(InputError, match=r"diary belongs to the text texts/diary.txt, a copy of .*/diary.txt: choose"):
        planned("../old.txt", "diary")
    for name in ("notes/a.txt", "notes/b.txt", "others/a.txt"):  # the others are a part of the notes
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy("../old.txt", tmp_path / name)
    learned("../notes", None)
    with pytest.raises(InputError, match=r"notes belongs to the text texts/notes, a copy of .*/notes: choose"):
        planned("../others", "notes")
    Path("poem.txt").write_text(ENGLISH * 99)
    learned("poem.txt", None)
    project.rename(tmp_path / "moved")  # and the working directory with it
    Path("poem.txt").write_text(ENGLISH * 100)
    assert planned("poem.txt", None).source.source == "texts/poem.txt"


def test_a_longer_plan_says_what_it_costs_and_is_one_of_two_also_after_an_interruption(project, monkeypatch):
    epochs = []

    def reproduce(_):
        epochs.append(load_params().values["optim"]["max_epochs"])
        if len(epochs) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(learn, "reproduce", reproduce)
    monkeypatch.setattr(learn, "_reached", lambda: False)
    monkeypatch.setattr(learn, "show_outcome", lambda next_step: None)
    main(["learn", "../diary.txt"])
    stored = read_json(Path("plans/diary.json"))
    seconds = duration(stored["cost"]["train_s"] + stored["cost"]["evaluation_s"])
    assert f", {seconds}, since half of them" in stored["lines"]["training"]
    assert stored["lines"]["cost"].startswith(f"at most {seconds} of training")
    assert main(["learn", "../diary.txt"]) == 0  # resumes the third, after which there is none
    assert epochs == pytest.approx([n * epochs[0] for n in (1, 2, 4, 4)], rel=0.01)
    assert main(["learn", "../diary.txt"]) == 0  # asks for more
    assert epochs[4:] == pytest.approx([n * epochs[0] for n in (4, 8, 16)], rel=0.01)


def test_no_other_command_changes_params_yaml_while_one_learns(project, monkeypatch, capsys):
    others = (["learn", "../log.txt", "--yes"], ["recipe", "smoke"], ["repro"])
    codes = []
    monkeypatch.setattr(learn, "reproduce", lambda _: codes.extend(main(other) for other in others))
    monkeypatch.setattr(learn, "_reached", lambda: True)
    monkeypatch.setattr(learn, "show_outcome", lambda next_step: None)
    assert main(["learn", "../diary.txt"]) == 0
    assert codes == [6, 6, 6]
    assert capsys.readouterr().err.count(f"params.yaml is held by process {os.getpid()}: wait for it or stop it") == 3
    assert load_params().values["registry"]["model"] == "diary"
    assert not Path("texts/log.txt").exists()
    assert main(["recipe", "smoke"]) == 0


def test_a_search_space_from_which_keys_were_removed_stays_so(project, monkeypatch):
    monkeypatch.setattr(learn, "reproduce", lambda environment: None)
    monkeypatch.setattr(learn, "_reached", lambda: True)
    monkeypatch.setattr(learn, "show_outcome", lambda next_step: None)
    lines = Path("params.yaml").read_text().splitlines(keepends=True)
    Path("params.yaml").write_text("".join(line for line in lines if " lr: {" not in line and "  step_tok" not in line
                                           and line != "    windows:\n"))  # fmt: skip
    assert main(["learn", "../diary.txt"]) == 0
    space = load_params().values["sweep"]["space"]
    assert set(space) == {"optim"}
    assert {"muon_lr", "max_epochs"} <= set(space["optim"]) < {*space["optim"], "lr"}


def test_params_yaml_without_a_default_is_not_said_to_change(project, monkeypatch, capsys):
    monkeypatch.setattr(learn, "reproduce", lambda environment: None)
    monkeypatch.setattr(learn, "_reached", lambda: True)
    monkeypatch.setattr(learn, "show_outcome", lambda next_step: None)
    lines = Path("params.yaml").read_text().splitlines(keepends=True)
    Path("params.yaml").write_text("".join(line for line in lines if not line.startswith("  require_target: ")))
    said = [main(["learn", "../diary.txt"]) or capsys.readouterr().out for _ in range(2)]
    assert ["params.yaml is changed as follows; plans/params-" in each for each in said] == [True, False]
    assert "params.yaml already has these values" in said[1]


@pytest.mark.parametrize(("answer", "trained"), [("", True), ("y", True), ("n", False), ("what", False)])
def test_a_terminal_is_asked_before_anything_is_written(project, monkeypatch, capsys, answer, trained):
    monkeypatch.setattr(learn, "reproduce", lambda environment: None)
    monkeypatch.setattr(learn, "_reached", lambda: True)
    monkeypatch.setattr(learn, "show_outcome", lambda next_step: None)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: answer)
    before = snapshot(project)
    assert main(["learn", "../diary.txt"]) == 0
    assert (snapshot(project) != before) is trained
    assert ("nothing was changed" in capsys.readouterr().out) is not trained


TWICE = "the same command again trains with twice the epochs"


@pytest.mark.parametrize(
    ("options", "reached", "budgets", "hint"),
    [
        ([], [True], [1], TWICE),
        ([], [False, True], [1, 2], TWICE),
        ([], [False], [1, 2, 4], TWICE),
        (["--time", "1h"], [False], [1], "the same command without --time trains longer"),  # the time that was given
        (["--goal", "generalise"], [False], [1], None),  # early stopping has ended it
    ],
)
def test_a_training_that_misses_its_target_is_followed_by_longer_ones(
    project, monkeypatch, options, reached, budgets, hint
):
    epochs, searched, shown = [], [], []

    def reproduce(_):
        values = load_params().values
        epochs.append(values["optim"]["max_epochs"])
        searched.append(values["sweep"]["space"]["optim"]["max_epochs"])

    monkeypatch.setattr(learn, "reproduce", reproduce)
    answers = [*reached]
    monkeypatch.setattr(learn, "_reached", lambda: answers.pop(0) if len(answers) > 1 else answers[0])
    monkeypatch.setattr(learn, "show_outcome", shown.append)
    assert main(["learn", "../diary.txt", *options]) == 0
    assert epochs == pytest.approx([factor * epochs[0] for factor in budgets], rel=0.01)
    assert searched == [{"low": round(0.75 * n, 1), "high": round(1.1 * n, 1)} for n in epochs]
    assert shown == [hint]  # what to do if the last one missed it too
    assert main(["learn", "../diary.txt", *options]) == 0  # resumes the last one
    assert epochs[len(budgets)] == epochs[len(budgets) - 1]


def test_published_weights_decide_the_shape_and_the_plan_says_what_is_copied(command, project):
    save_published(Path("../my gpt"), vocab_size=50257)
    code, said, _ = command("plan", "../diary.txt", "--init", "../my gpt")
    lines = dict(line.split(" ", 1) for line in said.splitlines())
    assert code == 0
    assert lines["tokenizer"].strip() == "gpt2: that of GPT-2's weights"
    assert lines["weights"].strip() == "../my gpt: 810,896 parameters to start from, copied to weights/my-gpt"
    assert lines["model"].strip().startswith("2 layers of 16, as in weights/my-gpt, but too small to")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--init", "../none"], "error: --init ../none not found: give the folder of a GPT-2, or hf://OWNER/NAME such"),
        (["--init", "../gpt", "--size", "smoke"], "error: --init and --size: give one of them"),
        (["--init", "../gpt", "--tokenizer", "bytes"], "error: ../gpt has no tokenizer.json, so its ids cannot be com"),
        (["--init", "../taken"], "error: weights/taken/config.json is of other weights than ../taken: rename the fold"),
        (["--init", "../taken.txt"], "error: --init ../taken.txt not found: give the folder of a GPT-2"),
        (["--init", "../diary.txt"], "error: --init ../diary.txt is a file: give the folder of a GPT-2"),
        (["--init", ""], "error: --init  not found: give the folder of a GPT-2"),
        (["--init", "../cut"], "error: ../cut: model.safetensors is truncated, or not a safetensors file ("),
    ],
)
def test_weights_that_cannot_be_used_are_refused_in_one_line_by_plan_and_learn(arguments, message, command):
    for name in ("gpt", "taken", "cut"):
        save_published(Path(f"../{name}"), vocab_size=50257)
    weights = Path("../cut/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    Path("weights/taken").mkdir(parents=True)
    Path("weights/taken/config.json").touch()
    for name in ("plan", "learn"):
        code, said, messages = command(name, "../diary.txt", *arguments)
        assert (code, said) == (2, "")
        assert messages.startswith(message), messages
        assert messages.count("\n") == 1


@pytest.mark.parametrize("in_place", [False, True])
def test_learn_brings_the_weights_and_writes_what_they_need(project, tmp_path, monkeypatch, in_place):
    save_published(Path("../gpt"), vocab_size=50257)
    monkeypatch.setattr(learn, "reproduce", lambda *_: None)
    monkeypatch.setattr(learn, "_reached", lambda: True)
    monkeypatch.setattr(learn, "show_outcome", lambda _: None)
    made = make_plan(find_source("../diary.txt", None), Options(init="weights/gpt"), tmp_path, find_weights("../gpt"))
    learn.learn(made, in_place=in_place, assume_yes=True)
    files = {path.name: path.is_symlink() for path in Path("weights/gpt").iterdir()}
    assert files == {"config.json": in_place, "model.safetensors": in_place}
    assert find_weights("../gpt").copies.keys() == {Path("weights/gpt") / name for name in files}
    assert find_weights("weights/gpt").init == "weights/gpt"
    params = load_params()
    check_params(params)
    model, optim = params.values["model"], params.values["optim"]
    assert [model[key] for key in ("init", "n_layer", "n_head", "n_embd", "fold_vocab")] == [
        "weights/gpt",
        2,
        2,
        16,
        False,
    ]
    assert (optim["name"], optim["lr"]) == ("adamw", 0.0063)  # 0.1 / 16, rounded
    (folder := tmp_path / "again").mkdir()
    again = make_plan(find_source("texts/diary.txt", None), Options(), folder)
    write_values({key: value for key, value in again.values.items() if not key.startswith("sweep.space")})
    assert load_params().values["model"]["init"] is None  # a training from random weights resets it
    assert load_params().values["model"]["fold_vocab"]
