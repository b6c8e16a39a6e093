"""api: the endpoints /generate and /next_token -> the same as the page's, for programs."""

from typing import Any

import gradio as gr

from pipeline.system.errors import PipelineError
from webapp.completion import checked_whole, write
from webapp.html import LEAST_PASSAGE, refusal
from webapp.model_source import Source
from webapp.tabs.next_token import expect


def endpoints(source: Source) -> None:
    """Add both to the page that is being composed."""

    def generate(  # type: ignore[misc]  # Gradio makes the documentation of one value from the hint
        prompt: str,
        max_tokens: int = 100,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        samples: int = 1,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Continue `prompt`. Streams {model, samples, finished, notice, tokens_per_s} until finished is true.

        A sample has its text, without the prompt; its novelty, the share of its tokens that lie in no passage of 8
        tokens or more of the training text; and those passages: text, place, which is a token of the training text,
        and length. max_tokens 0..2000, temperature 0..100 (0 is greedy), top_k 0..50257 (0: all), top_p in (0, 1],
        repetition_penalty in (0, 10] (1: none), samples 1..4, which draw with seed, seed + 1, ...
        """
        numbers = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        numbers |= {"repetition_penalty": repetition_penalty, "seed": seed}
        try:
            for writing in write(source.current(), prompt, samples, **numbers):
                yield {
                    "model": writing.served.label,
                    "samples": [_sample(writing, i) for i in range(len(writing.samples))],
                    "finished": writing.finished,
                    "notice": writing.notice,
                    "tokens_per_s": round(writing.tokens_per_s, 1),
                }
        except PipelineError as error:
            raise refusal(error, on_page=False) from None

    def next_token(prompt: str, most: int = 10) -> dict[str, Any]:
        """What may follow `prompt`: {model, entropy_nats, tokens, context_tokens, context_times}.

        Each of the `most` (1..1000) likeliest tokens has its id, its text (null for a part of a character, and for the
        end of a document), its probability at temperature 1, and how often the training text goes on with it after the
        longest end of the prompt that stands there: `context_tokens` tokens, `context_times` times.
        """
        served = source.current()
        try:
            found = expect(served, prompt, checked_whole("most", most, 1, 1000))
        except PipelineError as error:
            raise refusal(error, on_page=False) from None
        return {
            "model": served.label,
            "entropy_nats": found.entropy,
            "tokens": [
                {"id": one.token, "text": one.text, "probability": one.probability, "times_in_text": one.times}
                for one in found.likely
            ],
            "context_tokens": len(found.context),
            "context_times": found.times,
        }

    gr.api(generate, api_name="generate", concurrency_id="model")
    gr.api(next_token, api_name="next_token", concurrency_id="look")


def _sample(writing: Any, i: int) -> dict[str, Any]:
    served, start = writing.served, len(writing.prompt_ids)
    passages = [p for p in served.corpus.passages(writing.ids(i), LEAST_PASSAGE) if p.end > start]
    return {
        "text": writing.text(i),
        "seed": writing.seed + i,
        "novelty": writing.novelty(i),
        "passages": [
            {
                "text": served.tokenizer.decode(writing.ids(i)[p.begin : p.end]),
                "place": p.place,
                "length": p.end - p.begin,
            }
            for p in passages
        ],
    }
