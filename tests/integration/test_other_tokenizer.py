"""A new tokenizer needs only its class: all stages run with it, and its model can be registered and sampled."""

import shutil
from pathlib import Path

import pytest
from fixtures_mlflow import _cheap_versions, root_of  # noqa: F401 (a fixture)
from fixtures_tokenizer import _byte_tokenizer  # noqa: F401 (a fixture)

from pipeline.config.params import load_params
from pipeline.config.recipes import apply_recipe
from pipeline.config.sections import RegistryConfig
from pipeline.data.token_files import TokenFolder
from pipeline.model.generator import load_generator
from pipeline.model.sampling import Sampling
from pipeline.registry.artifacts import open_version
from pipeline.registry.export import export_hf
from pipeline.registry.register import register
from pipeline.system.errors import InputError
from pipeline.system.files import read_json
from pipeline.training import train
from stages import download, download_tokenizer, evaluate, tokenize
from tests.trainings import Untracked, change

ROOT = Path(__file__).parents[2]
TEXT = "Wer reitet so spät durch Nacht und Wind?\nEs ist der Vater mit seinem Kind.\n" * 20
CORPUS = {"corpus.source": "texts", "corpus.sha256": None, "corpus.mirrors": [], "corpus.fraction": 1.0}
MODEL = {"model.n_layer": 1, "model.n_embd": 16, "model.block_size": 16, "model.vocab_size": 257, "windows.seq_len": 16}
RUN = {"optim.max_epochs": 0.1, "samples.max_tokens": 2, "train.precision": "fp32", "train.threads": 1}


def test_a_tokenizer_from_outside_goes_through_all_stages(tmp_path, monkeypatch, store, cheap_versions, byte_tokenizer):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "Recorder", Untracked)
    shutil.copy(ROOT / "params.yaml", "params.yaml")
    apply_recipe("smoke", Path("params.yaml"), ROOT / "recipes")
    change(Path(), **CORPUS | MODEL | RUN | {"corpus.tokenizer": "bytes"})
    Path("texts").mkdir()
    for name in "ab":
        Path("texts", f"{name}.txt").write_text(TEXT)
    download.main()
    download_tokenizer.main()
    tokenize.main()
    train.run_tracked(load_params(), Path("data"), Path("models"), Path("reports/timing.json"))
    evaluate.main()
    tokens = TokenFolder(Path("data/tokens")).train
    assert bytes(tokens.read(0, 5).astype("u1")) == b"Wer r"
    assert tokens.counts()[[ord("W"), 256]].tolist() == [80, 1]  # of two documents
    assert read_json(Path("reports/corpus.json"))["frequent_tokens"][0]["text"] == " "
    assert read_json(Path("reports/metrics.json"))["sliding_loss"] < 6
    assert sorted(path.name for path in Path("data/tokenizer").iterdir()) == ["bytes.txt", "manifest.json"]
    registered = register(root_of(store), Path(), RegistryConfig(model="bytes", max_target_loss=0.1))
    files = open_version(store, store.client.get_model_version("bytes", registered["version"]))
    generator = load_generator(files)
    assert generator.tokenizer.name == "bytes"
    assert generator.next_tokens("Wer").shape == (257,)
    assert generator.next_tokens("Wer").sum() == pytest.approx(1)
    assert generator.text("Es ist spät", Sampling(max_tokens=40, temperature=1)).startswith("Es ist spät")
    with pytest.raises(InputError, match="export hf: the model's tokenizer is bytes, only GPT-2's can be exported"):
        export_hf(files, {}, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
