"""Write a model and its tokenizer as a GGUF file, the format of llama.cpp and of programs that contain it.

The tokenizer is written for one of llama.cpp's own: `gpt2`, whose split of text is named by `tokenizer.ggml.pre`, or
`rwkv`, which has no split, and takes the longest token at each place. A split of one's own cannot be stored.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.tokenizer import CHARACTERS, EOT, BytePairTokenizer, as_characters
from pipeline.model.gpt import GPT
from pipeline.system.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT_TYPES = {"f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "f32": "ALL_F32"}  # name -> its name in the package gguf


def write_gguf(
    path: Path, model: GPT, weights: "dict[str, Tensor]", tokenizer: BytePairTokenizer, weight_type: str, name: str
) -> None:
    """Write `path`. `weights`: Transformers' names and torch's layout, (out, in), without padded ids.

    Vectors and positions are fp32 in each type. In q8_0, a matrix whose rows are not whole blocks of 32 is f16. Raises
    InputError if the package gguf is missing.
    """
    try:
        import gguf
    except ImportError:
        raise InputError("export gguf needs the package gguf: `python -m pip install gguf` adds it") from None

    kinds = {"f16": gguf.GGMLQuantizationType.F16, "q8_0": gguf.GGMLQuantizationType.Q8_0}
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2])
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[WEIGHT_TYPES[weight_type]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(model.config.n_layer)
    writer.add_context_length(len(weights["transformer.wpe.weight"]))
    writer.add_embedding_length(model.config.n_embd)
    writer.add_feed_forward_length(4 * model.config.n_embd)
    writer.add_head_count(model.config.n_head)
    writer.add_layer_norm_eps(model.ln_f.eps)
    writer.add_tokenizer_model(tokenizer_model(tokenizer))
    writer.add_token_list(tokens_of(tokenizer))
    types = [gguf.TokenType.NORMAL] * tokenizer.n_vocab
    types[tokenizer.eot] = gguf.TokenType.CONTROL
    writer.add_token_types(types)
    if tokenizer_model(tokenizer) == "gpt2":
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges([" ".join(map(as_characters, pair)) for pair in merges_of(tokenizer.ranks)])
    writer.add_bos_token_id(tokenizer.eot)
    writer.add_eos_token_id(tokenizer.eot)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, model.config.n_layer)
    for theirs, tensor in weights.items():
        ours, values = names.get_name(theirs, try_suffixes=(".weight", ".bias")), tensor.float().numpy()
        kind = kinds.get(weight_type, gguf.GGMLQuantizationType.F32)
        if values.ndim == 1 or theirs == "transformer.wpe.weight":
            kind = gguf.GGMLQuantizationType.F32
        elif kind == gguf.GGMLQuantizationType.Q8_0 and values.shape[1] % 32:
            kind = gguf.GGMLQuantizationType.F16
        stored = gguf.quantize(np.ascontiguousarray(values), kind)
        writer.add_tensor(ours, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tokenizer_model(tokenizer: BytePairTokenizer) -> str:
    """The tokenizer of llama.cpp that gives its ids.

    If each character is a piece of its own, all tokens are bytes and whole characters. The longest token at each place
    then gives the same ids, whereas merges would need pairs that are no tokens.
    """
    return "rwkv" if tokenizer.pieces == CHARACTERS else "gpt2"


def tokens_of(tokenizer: BytePairTokenizer) -> list[str]:
    """The tokens by id, as its tokenizer in llama.cpp reads them; the last one is the end of text."""
    write = escaped if tokenizer_model(tokenizer) == "rwkv" else as_characters
    return [*map(write, sorted(tokenizer.ranks, key=tokenizer.ranks.__getitem__)), EOT]


def escaped(token: bytes) -> str:
    """A token with escapes: `\\\\` for a backslash, `\\xNN` for a byte that is no printable character of ASCII."""
    if len(token) > 1:
        return token.decode()
    return {"\\": r"\\"}.get(chr(token[0]), chr(token[0]) if 0x20 <= token[0] < 0x7F else f"\\x{token[0]:02x}")


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Each pair of tokens that gives a token, in the order of these tokens: tiktoken merges any of them."""
    splits = ((token[:i], token[i:]) for token in sorted(ranks, key=ranks.__getitem__) for i in range(1, len(token)))
    return [(left, right) for left, right in splits if left in ranks and right in ranks]
