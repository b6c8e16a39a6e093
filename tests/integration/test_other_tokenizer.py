"""All stages run with each tokenizer, and with a new one, which needs only its class; the model can be used."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from fixtures_mlflow import _cheap_versions, root_of  # noqa: F401 (a fixture)
from fixtures_tokenizer import _utf8_tokenizer  # noqa: F401 (a fixture)

from pipeline.config.params import load_params
from pipeline.config.recipes import apply_recipe
from pipeline.config.sections import RegistryConfig
from pipeline.data.token_files import TokenFolder
from pipeline.data.tokenizer import load_tokenizer
from pipeline.model.generator import load_generator
from pipeline.model.sampling import Sampling
from pipeline.registry.artifacts import open_version
from pipeline.registry.catalog import describe_version
from pipeline.registry.export import export_hf, export_version
from pipeline.registry.pyfunc import PromptModel
from pipeline.registry.register import register
from pipeline.system.errors import InputError
from pipeline.system.files import read_json
from pipeline.training import train
from stages import download, evaluate, tokenize
from stages import tokenizer as make
from tests.trainings import Untracked, change
from webapp.completion import complete
from webapp.model_source import Folder
from webapp.tabs.next_token import predict_next

ROOT = Path(__file__).parents[2]
TEXT = "Wer reitet so spät durch Nacht und Wind?\nEs ist der Vater mit seinem Kind.\n" * 20
CORPUS = {"corpus.source": "texts", "corpus.sha256": None, "corpus.mirrors": [], "corpus.fraction": 1.0}
MODEL = {"model.n_layer": 1, "model.n_embd": 16, "model.block_size": 16, "windows.seq_len": 16}
RUN = {"optim.max_epochs": 0.2, "samples.max_tokens": 2, "train.precision": "fp32", "train.threads": 1}


@pytest.mark.parametrize(
    ("name", "n_vocab", "file"),
    [
        ("utf8", 257, "utf8.txt"),
        ("bytes", 257, "bytes.tiktoken"),
        ("chars", 258, "chars.tiktoken"),
        ("bpe:280", 280, "bpe.tiktoken"),
    ],
)
def test_a_tokenizer_goes_through_all_stages(
    tmp_path, monkeypatch, store, cheap_versions, utf8_tokenizer, name, n_vocab, file
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "Recorder", Untracked)
    shutil.copy(ROOT / "params.yaml", "params.yaml")
    apply_recipe("smoke", Path("params.yaml"), ROOT / "recipes")
    change(Path(), **CORPUS | MODEL | RUN | {"corpus.tokenizer": name})
    Path("texts").mkdir()
    for letter in "ab":
        Path("texts", f"{letter}.txt").write_text(TEXT)
    download.main()
    make.main()
    tokenize.main()
    train.run_tracked(load_params(), Path("data"), Path("models"), Path("reports/timing.json"))
    evaluate.main()
    tokens, tokenizer = TokenFolder(Path("data/tokens")).train, load_tokenizer(Path("data/tokenizer"), name)
    assert tokenizer.decode(tokens.read(0, 5).tolist()) in TEXT
    assert tokens.counts()[tokenizer.eot] == 1  # of two documents
    assert tokenizer.n_vocab == n_vocab
    metrics, n_bytes = read_json(Path("reports/metrics.json")), 2 * len(TEXT.encode()) - 1  # without the first target
    bits = metrics["sliding_loss"] * (len(tokens) - 1) / n_bytes / math.log(2)
    assert metrics["sliding_bits_per_byte"] == pytest.approx(bits, rel=1e-3)
    assert metrics["sliding_loss"] < 6
    assert read_json(Path("models/run.json"))["results"]["bits_per_byte"] == pytest.approx(bits, rel=1e-3)
    assert read_json(Path("models/run.json"))["params"]["model"]["vocab_size"] == n_vocab
    assert sorted(path.name for path in Path("data/tokenizer").iterdir()) == sorted([file, "manifest.json"])
    registered = register(root_of(store), Path(), RegistryConfig(model="mine", max_target_loss=0.1))
    version = store.client.get_model_version("mine", registered["version"])
    files = open_version(store, version)
    generator = load_generator(files)
    assert generator.tokenizer.key == tokenizer.key
    assert generator.next_tokens("Wer").shape == (n_vocab,)
    assert generator.next_tokens("Wer").sum() == pytest.approx(1)
    prompt = "Es ist spät, 今天 😀"  # characters that the text lacks
    sampling = {"max_tokens": 40, "temperature": 1.0, "seed": 3}
    text = generator.text(prompt, Sampling(**sampling))
    assert text.startswith(prompt)
    served = PromptModel()  # what `mlflow models serve` loads
    served.load_context(SimpleNamespace(artifacts={"model": str(files / "model")}))
    assert served.predict(None, {"prompt": [prompt]}, sampling) == [text]
    export_version("space", files, describe_version(store, version, files), tmp_path / "space")
    page = Folder(tmp_path / "space" / "version").current()
    *_, completion = complete(page, prompt, 1, **sampling)  # /generate, and the page
    assert prompt + completion.text(0) == text
    answer = predict_next(page, "Es ist der", 3)
    assert (len(answer["tokens"]), answer["context_times"]) == (3, 40)
    assert page.examples[0].startswith("Wer reitet")
    if name == "utf8":
        with pytest.raises(InputError, match="export hf: the model's tokenizer is utf8, only"):
            export_hf(files, {}, tmp_path / "hf")
        assert not (tmp_path / "hf").exists()
