"""Compare the speed of text generation: this project and Hugging Face's `generate`, in turn, on this machine.

    python -m benchmarks.generation [--rounds 5] [--tokens 200] [--json FILE]

Every contestant continues the same prompts greedily with a GPT-2 of 124M parameters and random weights. Ours has
embedding rows for as many ids as Tiny Shakespeare has. Reported are medians: the time to the first token, and tokens/s
from the prompt to the last token, summed over all sequences. `prompt lookup` is the best case of prompt-lookup
decoding: its corpus is the text that the model is about to generate, so every draft token is accepted.

If there is a trained model in `models/model`, it then recites its own text from fifty places, with and without prompt
lookup. Also measured is how often the most likely token is the same in bf16 and in fp32.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.throughput import N_USED, machine_name, shape_of, synchronise
from pipeline.config.params import load_params
from pipeline.config.sections import TrainConfig
from pipeline.data.corpus_index import CorpusIndex
from pipeline.data.token_files import TokenFolder
from pipeline.data.tokenizer import Tokenizer, load_tokenizer
from pipeline.data.vocab import Vocabulary
from pipeline.model.generator import Generator, Piece
from pipeline.model.gpt import GPT
from pipeline.model.sampling import Sampling
from pipeline.model.weights import load_model
from pipeline.system.device import Machine, prepare_machine

PROMPTS = [f"{n} ships came home from the sea" for n in range(10, 26)]  # of equal length, for Hugging Face
PLACES = 50
Write = Callable[[list[str], int], None]  # continues each prompt by that number of tokens


class Contestant(NamedTuple):
    name: str
    write: Write
    share: float = 1.0  # share of the requested tokens that it generates, if all would take minutes


def ours(model: GPT, tokenizer: Tokenizer, precision: str, prompt_lookup: bool = False) -> Write:
    generator = Generator(model, tokenizer, precision=precision)

    def write(prompts: list[str], n: int) -> None:
        for _ in generator.stream(prompts, Sampling(max_tokens=n, temperature=0)):
            pass

    if prompt_lookup:
        pieces = list(generator.stream(PROMPTS, Sampling(max_tokens=1000, temperature=0)))
        text = [i for number in range(len(PROMPTS)) for piece in pieces if piece.sequence == number for i in piece.ids]
        generator.corpus = CorpusIndex(text)
    return write


def hugging_face(tokenizer: Tokenizer, dtype: torch.dtype, device: torch.device, cached: bool) -> Write:
    from transformers import GPT2Config, GPT2LMHeadModel, logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval().to(device, dtype)
    model.generation_config.eos_token_id = None  # so that no sequence ends early
    model.generation_config.pad_token_id = 0

    def write(prompts: list[str], n: int) -> None:
        ids = torch.tensor([tokenizer.encode(prompt) for prompt in prompts], device=device)
        settings: dict[str, Any] = {"max_new_tokens": n, "do_sample": False, "use_cache": cached}
        model.generate(ids, attention_mask=torch.ones_like(ids), **settings)

    return write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=200, help="number of tokens to generate for each sequence")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    machine, tokenizer = prepare_machine(load_params().section(TrainConfig)), load_tokenizer(Path("data/tokenizer"))
    report: dict[str, Any] = {"machine": machine_name(), "torch": torch.__version__, "tokens": arguments.tokens}
    print(f"GPT-2 124M on {report['machine']}, torch {report['torch']}, {machine.precision}, "
          f"{arguments.tokens} tokens, median of {arguments.rounds} rounds")  # fmt: skip
    vocabulary = Vocabulary.of(np.arange(50257) < N_USED, 50257)
    model = GPT(shape_of("124M"), vocabulary).initialise(1).eval().to(machine.device)
    half = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[machine.precision]
    contestants = [
        Contestant(f"ours, {machine.precision}", ours(model, tokenizer, machine.precision)),
        Contestant(
            f"ours, {machine.precision}, prompt lookup", ours(model, tokenizer, machine.precision, prompt_lookup=True)
        ),
        Contestant("ours, fp32", ours(model, tokenizer, "fp32")),
        Contestant(f"Hugging Face, {machine.precision}", hugging_face(tokenizer, half, machine.device, True)),
        Contestant("Hugging Face, fp32", hugging_face(tokenizer, torch.float32, machine.device, True)),
        Contestant("no cache, fp32", hugging_face(tokenizer, torch.float32, machine.device, False), share=0.1),
    ]
    report["contestants"] = compare(contestants, arguments.rounds, arguments.tokens)
    if Path("models/model").is_dir():
        report["trained"] = recite(tokenizer, machine)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def compare(contestants: list[Contestant], rounds: int, n_tokens: int) -> dict[str, Any]:
    """Measure all contestants in turn, with one sequence and with sixteen; print a table and return its figures."""
    cases = [(contestant, n) for contestant in contestants for n in (1, len(PROMPTS))]
    first_s: list[list[float]] = [[] for _ in cases]
    speed: list[list[float]] = [[] for _ in cases]
    for turn in range(rounds + 1):  # the first one warms up
        for i, (contestant, n_sequences) in enumerate(cases):
            n = max(2, round(n_tokens * contestant.share))
            first = timed(contestant.write, PROMPTS[:n_sequences], 1)
            whole = timed(contestant.write, PROMPTS[:n_sequences], n)
            if turn:
                first_s[i].append(first)
                speed[i].append(n_sequences * n / whole)
    columns = "{:28} {:>9} {:>15} {:>9}"
    print(columns.format("", "sequences", "first token, ms", "tokens/s"))
    figures: dict[str, Any] = {}
    for (contestant, n_sequences), first, speeds in zip(cases, first_s, speed, strict=True):
        first_ms, tokens_per_s = 1e3 * statistics.median(first), statistics.median(speeds)
        print(columns.format(contestant.name, n_sequences, f"{first_ms:.1f}", f"{tokens_per_s:,.0f}"))
        figures.setdefault(contestant.name, {})[str(n_sequences)] = {
            "first_token_ms": round(first_ms, 1),
            "tokens_per_s": round(tokens_per_s, 1),
            "all_tokens_per_s": [round(value, 1) for value in speeds],
        }
    return figures


def recite(tokenizer: Tokenizer, machine: Machine) -> dict[str, Any]:
    """Measure the trained model while it recites, with and without prompt lookup, and how often bf16 and fp32 agree."""
    text = TokenFolder(Path("data/tokens")).train
    ids = text.read(0, len(text)).astype(np.int64)
    model = load_model(Path("models/model"), text.counts()).to(machine.device)
    length = model.trained_length // 2
    starts = range(0, len(ids) - 2 * length, -(-len(ids) // PLACES))
    prompts = [tokenizer.decode(ids[start : start + length].tolist()) for start in starts]
    greedy = Sampling(max_tokens=length, temperature=0)
    figures: dict[str, Any] = {"n_params": model.config.n_params, "n_tokens": length * len(prompts)}
    print(f"\nthe trained model, {model.config.n_params:,} parameters, {length} tokens from {len(prompts)} places")
    for name, corpus in (("plain", None), ("prompt lookup", CorpusIndex(ids))):
        generator = Generator(model, tokenizer, corpus, machine.precision)
        generator.text(prompts[0], greedy)
        pieces: list[Piece] = []
        seconds = timed(lambda generator=generator, pieces=pieces: pieces.extend(
            piece for prompt in prompts for piece in generator.stream([prompt], greedy)
        ))  # fmt: skip
        written = sum(len(piece.ids) for piece in pieces)
        figures[name] = {"tokens_per_s": round(written / seconds), "tokens_per_step": round(written / len(pieces), 2)}
        print(f"{name:13} {written / seconds:8,.0f} tokens/s, {written / len(pieces):.2f} tokens a step")
    inputs = model.vocabulary.fold(torch.from_numpy(ids[: len(ids) // (2 * length) * 2 * length])).view(-1, 2 * length)
    ranked = [most_likely(Generator(model, tokenizer, precision=p), inputs) for p in (machine.precision, "fp32")]
    figures["greedy_agreement"] = round(float((ranked[0] == ranked[1]).float().mean()), 5)
    agreement = f"{figures['greedy_agreement']:.2%} of {inputs.numel():,}"
    print(f"same most likely token in {machine.precision} and fp32: {agreement}")
    return figures


def most_likely(generator: Generator, windows: torch.Tensor) -> torch.Tensor:
    """The most likely next compact id at each position of the `windows`, (N, T)."""
    decoder = generator.decoder
    hidden_states = (
        decoder.prefill(batch.to(decoder.wte.device), decoder.new_cache(len(batch)), list(range(len(batch))))
        for batch in windows.split(16)
    )
    return torch.cat([decoder.logits(hidden).argmax(dim=2).cpu() for hidden in hidden_states])


def timed(call: Callable[..., None], *arguments: Any) -> float:
    synchronise()
    started = time.perf_counter()
    call(*arguments)
    synchronise()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
