"""The body of POST /v1/completions. What is not supported is refused, not ignored."""

import secrets
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, field_validator, model_validator

from pipeline.model.sampling import Sampling, StopText
from webapp.completion import MAX_TOKENS

MAX_CHOICES = 128  # of a request: prompts times n
MAX_STOPS = 4
MAX_PROMPT_TOKENS = 10_000
MAX_SCORED_TOKENS = 20_000  # of the prompts of all choices, where their log-probabilities are returned
MAX_TOP = 5  # log-probabilities of other tokens


def _default_for_null(default: Any) -> BeforeValidator:
    """OpenAI takes null for the default."""
    return BeforeValidator(lambda value: default if value is None else value)


def _as_tuple(value: Any) -> Any:
    """A stop text, a list of them, or null."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


STOP_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "maxItems": MAX_STOPS},
        {"type": "null"},
    ]
}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = Field(False, description="send the usage in a last chunk without choices")
    include_obfuscation: bool = Field(False, description="accepted; nothing is added to a chunk")


class CompletionRequest(BaseModel):
    """A prompt, or several, to be continued."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"example": {"model": "champion", "prompt": "ROMEO:", "max_tokens": 50, "seed": 1}},
    )

    model: str | None = Field(None, max_length=300, description="an id of /v1/models; null: the served version")
    prompt: str | list[int] | list[str] | list[list[int]] = Field(
        description=f"text or token ids, or a list of them; {MAX_PROMPT_TOKENS:,} tokens each at most"
    )
    max_tokens: Annotated[int, _default_for_null(16)] = Field(
        16, ge=0, le=MAX_TOKENS, description="tokens to generate; 0 with echo: only the prompt"
    )
    temperature: Annotated[float, _default_for_null(1.0)] = Field(1.0, ge=0, le=2, description="0: greedy")
    top_p: Annotated[float, _default_for_null(1.0)] = Field(1.0, gt=0, le=1, description="nucleus sampling")
    n: Annotated[int, _default_for_null(1)] = Field(
        1, ge=1, le=MAX_CHOICES, description="choices of each prompt, with the seeds seed, seed + 1, ..."
    )
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="the same seed gives the same text; null: a random one"
    )
    stop: Annotated[tuple[StopText, ...], BeforeValidator(_as_tuple), WithJsonSchema(STOP_SCHEMA)] = Field(
        (),
        max_length=MAX_STOPS,
        description="a text of up to 1,000 characters, or a list of up to 4: a choice ends before the first one",
    )
    stream: Annotated[bool, _default_for_null(False)] = Field(
        False, description="send chunks as server-sent events; the last one is [DONE]"
    )
    stream_options: StreamOptions | None = Field(None, description="only with stream")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP, description="report the log-probability of each token, and of this many likeliest ones"
    )
    echo: Annotated[bool, _default_for_null(False)] = Field(
        False,
        description=f"return the prompt as well; with logprobs, {MAX_SCORED_TOKENS:,} tokens at most, counted n times",
    )
    top_k: Annotated[int, _default_for_null(0)] = Field(
        0, ge=0, le=65_536, description="not of OpenAI: sample from the k most likely tokens; 0: from all"
    )
    repetition_penalty: Annotated[float, _default_for_null(1.0)] = Field(
        1.0, ge=0.1, le=10, description="not of OpenAI: above 1, tokens that occurred are less likely"
    )
    user: str | None = Field(None, description="accepted; it changes nothing")
    best_of: int | None = Field(None, description="not supported, except a value equal to n")
    suffix: str | None = Field(None, description="not supported")
    logit_bias: dict[str, float] | None = Field(None, description="not supported")
    presence_penalty: float | None = Field(None, description="not supported, except 0")
    frequency_penalty: float | None = Field(None, description="not supported, except 0")

    @field_validator("stop")
    @classmethod
    def _stops_are_texts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("an empty text ends nothing: leave it out")
        return value

    @field_validator("suffix", "logit_bias", "presence_penalty", "frequency_penalty")
    @classmethod
    def _unsupported(cls, value: Any) -> Any:
        if value:
            raise ValueError("not supported: leave it out")
        return value

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options: only with stream: true")
        if self.best_of not in (None, self.n):
            raise ValueError("best_of: not supported: leave it out")
        if not self.prompts:
            raise ValueError("prompt: an empty list: give at least one prompt")
        if len(self.prompts) * self.n > MAX_CHOICES:
            raise ValueError(f"n: {len(self.prompts) * self.n} choices, prompts times n: {MAX_CHOICES} at most")
        if not self.max_tokens and not self.echo:
            raise ValueError("max_tokens: 0 generates nothing: it is only for echo")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # pydantic has checked that all are ids
        return self.prompt  # type: ignore[return-value]

    def sampling(self) -> Sampling:
        seed = secrets.randbits(32) if self.seed is None else self.seed % 2**63
        return Sampling(
            max_tokens=self.max_tokens, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
            repetition_penalty=self.repetition_penalty, seed=seed, stop=self.stop,
        )  # fmt: skip
