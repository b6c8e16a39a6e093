"""The GGUF file of a model: its tensors, and its tokenizer as llama.cpp reads it."""

import re
from argparse import Namespace

import gguf
import pytest
import torch
from fixtures_registry import save_small_model, version_info, write_version
from fixtures_tokenizer import POEM

from pipeline.commands import export
from pipeline.data.tokenizer import BYTES, make_tokenizer
from pipeline.model.weights import load_model
from pipeline.registry.export import export_gguf, torch_weights
from pipeline.registry.gguf_file import WEIGHT_TYPES, escaped, merges_of, write_gguf
from pipeline.system.errors import InputError

KINDS = {"bytes": "rwkv", "chars": "rwkv", "bpe:320": "gpt2"}  # tokenizer -> its tokenizer in llama.cpp
ERROR = {"f32": 0, "f16": 5e-4, "q8_0": 0.005}  # largest error of a weight, relative to the largest weight


def unescape(token: str) -> bytes:
    r"""What llama.cpp reads for its tokenizer rwkv: \xNN, and a backslash before any other character."""
    parts = re.findall(r"\\x([0-9a-f]{2})|\\(.)|([^\\])", token, re.DOTALL)
    return b"".join(bytes.fromhex(code) if code else (other or plain).encode() for code, other, plain in parts)


@pytest.fixture(params=KINDS)
def tokenizer(request, tmp_path):
    return make_tokenizer(request.param, tmp_path / "tokenizer", [POEM.encode()])


@pytest.fixture
def reader(tokenizer, tmp_path):
    save_small_model(tmp_path / "model", tmp_path / "tokenizer", vocab_size=tokenizer.n_vocab + 5)
    model = load_model(tmp_path / "model")
    weights = torch_weights(model, tokenizer.n_vocab)
    write_gguf(tmp_path / "a.gguf", model, weights, tokenizer, "f16", "a model")
    return gguf.GGUFReader(tmp_path / "a.gguf")


def test_its_tokenizer_has_all_ids_and_merges(tokenizer, reader):
    fields = {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in reader.fields.items()}
    read = unescape if fields["model"] == "rwkv" else lambda token: bytes(BYTES[character] for character in token)
    *tokens, last = fields["tokens"]
    assert fields["model"] == KINDS[tokenizer.name]
    assert [read(token) for token in tokens] == sorted(tokenizer.ranks, key=tokenizer.ranks.get)
    assert (last, fields["eos_token_id"], fields["add_bos_token"]) == ("<|endoftext|>", tokenizer.eot, False)
    assert fields["token_type"] == [gguf.TokenType.NORMAL] * tokenizer.eot + [gguf.TokenType.CONTROL]
    assert reader.tensors[0].shape.tolist() == [8, tokenizer.n_vocab]  # without padded ids
    if fields["model"] == "gpt2":
        assert fields["pre"] == "gpt-2"
        assert len(fields["merges"]) == len(merges_of(tokenizer.ranks)) >= tokenizer.n_vocab - 257


def test_merges_are_all_pairs_in_the_order_of_their_tokens():
    ranks = {b"a": 0, b"b": 1, b"ba": 2, b"ab": 3, b"aba": 4, b"abc": 5}  # "c" is no token
    assert merges_of(ranks) == [(b"b", b"a"), (b"a", b"b"), (b"a", b"ba"), (b"ab", b"a")]


@pytest.mark.parametrize(
    ("token", "written"), [(b"a", "a"), (b"\\", r"\\"), (b"\n", r"\x0a"), (b"\xc3", r"\xc3"), ("é".encode(), "é")]
)
def test_a_byte_is_escaped_unless_it_is_printable(token, written):
    assert escaped(token) == written
    assert unescape(written) == token


@pytest.mark.parametrize("weight_type", WEIGHT_TYPES)
def test_weights_have_the_precision_of_their_type(weight_type, tmp_path):
    tokenizer = make_tokenizer("bytes", tmp_path / "tokenizer", [])
    save_small_model(tmp_path / "model", tmp_path / "tokenizer", n_embd=32, vocab_size=257)
    weights = torch_weights(model := load_model(tmp_path / "model"), 257)
    write_gguf(tmp_path / "a.gguf", model, weights, tokenizer, weight_type, "a model")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert len(tensors) == len(weights)
    for ours, theirs in (
        ("transformer.wte", "token_embd"),
        ("transformer.h.1.mlp.c_proj", "blk.1.ffn_down"),
        ("transformer.h.0.attn.c_attn", "blk.0.attn_qkv"),
    ):
        tensor, weight = tensors[f"{theirs}.weight"], weights[f"{ours}.weight"]
        assert tensor.tensor_type.name.lower() == weight_type
        found = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        torch.testing.assert_close(found, weight, rtol=0, atol=ERROR[weight_type] * float(weight.abs().max()))
    assert tensors["position_embd.weight"].tensor_type.name == tensors["output_norm.bias"].tensor_type.name == "F32"


def test_the_card_and_the_modelfile_say_how_to_use_it(tmp_path, bpe, tokenizer):
    version = write_version(tmp_path / "version", tmp_path / "tokenizer", tokenizer)
    (folder := tmp_path / "gguf").mkdir()
    export_gguf(version / "artifacts", version_info(), folder, "q8_0")
    card, modelfile = (folder / "README.md").read_text(), (folder / "Modelfile").read_text()
    assert (folder / "shakespeare-gpt2-v3-q8_0.gguf").is_file()
    assert "FROM ./shakespeare-gpt2-v3-q8_0.gguf" in modelfile
    assert 'TEMPLATE """{{ .Prompt }}"""' in modelfile
    assert "num_ctx 16" in modelfile
    assert "at most 16 tokens" in card
    assert "0.0912 nats per token" in card
    assert ("combining marks" in card) == (tokenizer.name == "bpe:320")
    assert "License: MIT" not in card
    assert "license: mit" in card


def test_a_type_that_is_unknown_and_a_package_that_is_missing_are_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--type q4: unknown, choose one of f16, q8_0, f32"):
        export.run(Namespace(kind="gguf", folder=tmp_path, version="champion", type="q4"))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    tokenizer = make_tokenizer("bytes", tmp_path / "tokenizer", [])
    with pytest.raises(InputError, match="-m pip install gguf"):
        write_gguf(tmp_path / "a.gguf", None, {}, tokenizer, "f16", "a")
