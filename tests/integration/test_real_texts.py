"""Each tokenizer on real texts: Arabic, Korean, five hundred languages, English plays, Python's documentation."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from fixtures_texts import SOURCES, real_text  # noqa: F401 (a fixture)

from pipeline.config.params import load_params
from pipeline.config.recipes import apply_recipe
from pipeline.data import encode
from pipeline.data.encode import Task, training_text, write_tokens
from pipeline.data.statistics import bits_per_byte, bytes_per_token, describe_corpus
from pipeline.data.token_files import TokenFolder
from pipeline.data.tokenizer import load_tokenizer, make_tokenizer
from pipeline.model.generator import load_generator
from pipeline.model.sampling import Sampling
from pipeline.system.files import read_json
from pipeline.training import train
from stages import download, evaluate, tokenize
from stages import tokenizer as make
from tests.trainings import Untracked, change

ROOT = Path(__file__).parents[2]
NAMES = [*SOURCES, "Python"]
ENCODED_BYTES, TRAINED_BYTES = 400_000, 40_000  # of each text


def shortened(text, n_bytes):
    """About `n_bytes` of a text: of many documents the beginning of each."""
    documents = text.split("\0")
    most = n_bytes // len(documents)
    return "\0".join(part.encode()[:most].decode(errors="ignore") for part in documents)


@pytest.mark.parametrize("name", NAMES)
def test_a_text_is_encoded_in_shards_and_decoded_to_itself(name, real_text, bpe, tmp_path, monkeypatch):  # noqa: F811
    text = shortened(real_text(name), ENCODED_BYTES)
    (corpus := tmp_path / "corpus.txt").write_bytes(text.encode())
    monkeypatch.setattr(encode, "BLOCK_BYTES", 1 << 15)
    sizes = {}
    for tokenizer_name in ("gpt2", "bytes", "chars", "bpe:2000"):
        if tokenizer_name == "gpt2":
            tokenizer = load_tokenizer(bpe)
        else:
            tokenizer = make_tokenizer(tokenizer_name, tmp_path / "tokenizer", training_text(corpus, 1.0, 0.0))
        folder = tmp_path / tokenizer_name.replace(":", "-")
        for number in range(2):
            write_tokens(corpus, tokenizer, folder, 1.0, 0.0, Task(number, 2), shard_bytes=100_000)
        write_tokens(corpus, tokenizer, folder, shard_bytes=100_000)
        tokens = TokenFolder(folder).train
        ids = tokens.read(0, len(tokens))
        parts = [part.tolist() for part in np.split(ids, np.flatnonzero(ids == tokenizer.eot))]
        decoded = [tokenizer.decode(part[1:] if number else part) for number, part in enumerate(parts)]
        assert decoded == text.split("\0")
        assert [part[bool(number) :] for number, part in enumerate(parts)] == list(map(tokenizer.encode, decoded))
        described = describe_corpus(tokens, tokens, tokenizer)
        assert described["bytes"] == len(text.replace("\0", "").encode())
        assert described["characters"] == len(text.replace("\0", ""))
        uniform = bits_per_byte(math.log(2), bytes_per_token(tokens, tokenizer))  # one bit a token
        assert uniform == pytest.approx(len(ids) / described["bytes"], rel=1e-3)
        sizes[tokenizer_name] = len(ids)
    assert sizes["bytes"] == len(text.encode())
    assert sizes["chars"] == len(text)
    assert sizes["bpe:2000"] < sizes["chars"]
    if name in ("Arabic", "Korean"):
        assert sizes["bpe:2000"] < sizes["gpt2"]


@pytest.mark.parametrize(("name", "tokenizer"), [("Arabic", "chars"), ("five hundred languages", "bpe:1000")])
def test_a_model_of_a_text_is_trained_and_continues_it(name, tokenizer, real_text, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "Recorder", Untracked)
    shutil.copy(ROOT / "params.yaml", "params.yaml")
    apply_recipe("smoke", Path("params.yaml"), ROOT / "recipes")
    corpus = {"source": "texts", "sha256": None, "mirrors": [], "fraction": 1.0, "val_fraction": 0.1}
    change(Path(), **{f"corpus.{key}": value for key, value in corpus.items()} | {"corpus.tokenizer": tokenizer})
    change(Path(), **{"optim.max_epochs": 0.05, "target.rule": "validation", "samples.max_tokens": 5})
    text = shortened(real_text(name), TRAINED_BYTES)
    change(Path(), **{"samples.prompts": [prompt := text[:20]]})
    Path("texts").mkdir()
    records = [json.dumps({"text": part}) for part in text.split("\0") if part.strip()]
    Path("texts/mine.jsonl").write_text("\n".join(records))
    for stage in (download, make, tokenize):
        stage.main()
    train.run_tracked(load_params(), Path("data"), Path("models"), Path("reports/timing.json"))
    evaluate.main()
    metrics = read_json(Path("reports/metrics.json"))
    assert 0 < metrics["validation_bits_per_byte"] < 8  # bits of a byte; less than if nothing was learnt
    shutil.copytree("data/tokens", "models/tokens")
    generator = load_generator(Path("models"))
    assert generator.tokenizer.name == tokenizer
    assert generator.text(prompt, Sampling(max_tokens=20, temperature=1)).startswith(prompt)
