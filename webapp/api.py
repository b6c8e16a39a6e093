"""The API endpoints /generate and /next_token."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from pipeline.system.errors import PipelineError
from pipeline.system.words import encodable
from webapp.completion import Completion, complete
from webapp.events import CONCURRENT
from webapp.fields import checked_int
from webapp.model_source import Source
from webapp.tabs.next_token import predict_next


def add_endpoints(source: Source) -> None:
    """Add both endpoints to the gr.Blocks that is being built."""

    def generate(  # type: ignore[misc]  # Gradio documents one streamed value from this hint
        prompt: str,
        max_tokens: int = 100,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        samples: int = 1,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Complete `prompt`. Streams {model, samples, finished, notice, tokens_per_s} until finished is true.

        A sample has `text`, without the prompt, `passages` and `novelty`. `passages` are those that the training text
        contains too, each with text, place (index of its first token there) and length in tokens, which is at least 8,
        and as many as 26 bytes take. `novelty` is the share of the tokens that are in no passage. Arguments:
        max_tokens 0..2000, temperature 0..100 (0 is greedy), top_k 0..65536 (0: all), top_p in (0, 1],
        repetition_penalty 0.1..10 (1: none), samples 1..4.
        The samples use seed, seed + 1, ...
        """
        numbers = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        numbers |= {"repetition_penalty": repetition_penalty, "seed": seed}
        with user_errors():
            for completion in complete(source.current(), prompt, samples, **numbers):
                yield {
                    "model": completion.served.label,
                    "samples": [_sample(completion, i) for i in range(len(completion.samples))],
                    "finished": completion.finished,
                    "notice": completion.notice,
                    "tokens_per_s": round(completion.tokens_per_s, 1),
                }

    def next_token(prompt: str, most: int = 10, part: str = "") -> dict[str, Any]:
        """Predict the token after `prompt`: {model, entropy_nats, tokens, context_tokens, context_times}.

        `tokens` are the `most` (1..1000) most likely ones. Each has id, text (null for a part of a character and for
        the end-of-text token), bytes (in hexadecimal), probability (at temperature 1), and times_in_text: how often it
        follows the context in the training text. The context is the longest suffix of the prompt that occurs there. It
        has `context_tokens` tokens and occurs `context_times` times. `part`: ids of up to 8 tokens after the prompt,
        separated by spaces, such as the first tokens of a character.
        """
        with user_errors():
            return predict_next(source.current(), prompt, checked_int("most", most, 1, 1000), part)

    gr.api(generate, api_name="generate", concurrency_id="model", concurrency_limit=CONCURRENT["model"])
    gr.api(next_token, api_name="next_token", concurrency_id="read", concurrency_limit=CONCURRENT["read"])


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a PipelineError into a gr.Error of one line without a traceback."""
    try:
        yield
    except PipelineError as error:
        raise gr.Error(encodable(str(error)), duration=8, print_exception=False, title="Not possible") from None


def _sample(completion: Completion, i: int) -> dict[str, Any]:
    served, ids, start = completion.served, completion.ids(i), len(completion.prompt_ids)
    return {
        "text": completion.text(i),
        "seed": completion.seed + i,
        "novelty": completion.novelty(i),
        "passages": [
            {"text": served.tokenizer.decode(ids[begin:end]), "place": place, "length": end - begin}
            for begin, end, place in completion.passages[i]
            if end > start
        ],
    }
