"""Other programs compute the same from a GGUF file: Transformers, and llama.cpp where its package is installed."""

import unicodedata
from typing import Any

import pytest
import torch
from fixtures_registry import _keep_threads, version_info, write_version  # noqa: F401 (a fixture)
from fixtures_tokenizer import POEM

from pipeline.data.tokenizer import make_tokenizer
from pipeline.model.generator import load_generator
from pipeline.model.sampling import Sampling
from pipeline.model.weights import load_model
from pipeline.registry.export import export_version

TEXTS = [
    POEM,
    "  two  blanks \n\n and\tothers \u2028\u00a0x ",
    "I'll 'LL don't 'S 12 345",
    "naïve é ﬁ Ǆ 字 ١٢ ² ½ 🤖 \x00 \ufeff\u200b\\ \\n",
    "e\u0301 and \u0645\u064e\u0631",  # with combining marks
]


@pytest.fixture(params=["gpt2", "bytes", "chars", "bpe:320"])
def exported(request, tmp_path, bpe, tokenizer) -> tuple[Any, str]:
    """A version's folder and tokenizer, and the path of its GGUF file: without padded ids and untrained positions."""
    folder, ours = bpe, tokenizer
    if request.param != "gpt2":
        ours = make_tokenizer(request.param, folder := tmp_path / "tokenizer", [POEM.encode()])
    version = write_version(tmp_path / "version", folder, ours, vocab_size=ours.n_vocab + 5, trained_length=12)
    export_version("gguf", version / "artifacts", version_info(), tmp_path / "gguf")
    return ours, str(next((tmp_path / "gguf").glob("*.gguf")))


def test_transformers_computes_the_same_logits(exported, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # read when it is imported
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    ours, path = exported
    config = load_gguf_checkpoint(path)["config"]
    assert (config["n_ctx"], config["vocab_size"], config["eos_token_id"]) == (12, ours.n_vocab, ours.eot)
    shape = transformers.GPT2Config(**config, n_positions=config["n_ctx"])  # which it does not set itself
    model = transformers.GPT2LMHeadModel(shape).eval()
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    missing, surplus = model.load_state_dict(tensors, strict=False)
    assert (missing, surplus) == (["lm_head.weight"], [])  # tied
    ids = torch.randint(ours.n_vocab, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = load_model(tmp_path / "version" / "artifacts" / "model")(ids)[..., : ours.n_vocab]
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-2)


def test_llama_cpp_gives_the_same_ids_and_the_same_greedy_text(exported, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    ours, path = exported
    model = llama_cpp.Llama(path, n_ctx=12, verbose=False)
    for text in TEXTS:
        ids = model.tokenize(text.encode(), add_bos=False, special=False)
        has_marks = any(unicodedata.category(character).startswith("M") for character in text)
        if not (has_marks and ours.name == "bpe:320"):  # as the card says
            assert ids == ours.encode(text), repr(text[:40])
        assert b"".join(model.detokenize([id_]) for id_ in ids) == text.encode()
    assert model.tokenize(b"<|endoftext|>", add_bos=False, special=True) == [ours.eot]
    generator = load_generator(tmp_path / "version" / "artifacts")
    for prompt in ("We", "the", "Ro"):
        found = model.create_completion(prompt, max_tokens=6, temperature=0)["choices"][0]["text"]
        expected = generator.text(prompt, Sampling(max_tokens=6, temperature=0))
        assert prompt + found == expected.replace("\ufffd", "")  # its package leaves parts of characters out
