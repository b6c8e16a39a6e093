"""Bodies of /v1/completions: what they mean, and how wrong ones are refused."""

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from webapp.openai_api.errors import _fault
from webapp.openai_api.schema import CompletionRequest


def test_null_and_missing_fields_have_openais_defaults():
    for body in ({}, dict.fromkeys(("max_tokens", "temperature", "top_p", "n", "stop", "stream", "echo", "seed"))):
        sampling = CompletionRequest.model_validate({"prompt": "a", **body}).sampling()
        assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.stop) == (16, 1, 1, ())


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("", [""]), ("a", ["a"]), ([1, 2], [[1, 2]]), (["a", "b"], ["a", "b"]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_a_prompt_is_text_or_ids_or_a_list_of_them(prompt, prompts):
    assert CompletionRequest.model_validate({"prompt": prompt}).prompts == prompts


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"prompt": None}, "prompt", "a list of texts"),
        ({"prompt": 7}, "prompt", "a list of texts"),
        ({"prompt": ["a", 1]}, "prompt", "a list of texts"),
        ({"prompt": [True]}, "prompt", "a list of texts"),
        ({"prompt": []}, "prompt", "at least one"),
        ({"prompt": ["a"] * 65, "n": 2}, "n", "128 at most"),
        ({"model": 7}, "model", "valid string"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"max_tokens": 0}, "max_tokens", "only for echo"),
        ({"max_tokens": 2001}, "max_tokens", "less than or equal to 2000"),
        ({"max_tokens": "5"}, "max_tokens", "valid integer"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"temperature": float("nan")}, "temperature", ""),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty", "greater than or equal to 0.1"),
        ({"n": 129}, "n", "less than or equal to 128"),
        ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
        ({"logprobs": True}, "logprobs", "valid integer"),
        ({"stop": list("abcde")}, "stop", "a list of at most 4 of them"),
        ({"stop": [1]}, "stop", "give a text of at most"),
        ({"stop": 1}, "stop", "give a text of at most"),
        ({"stop": ""}, "stop", "an empty text"),
        ({"stop": ["a", ""]}, "stop", "an empty text"),
        ({"stop": ["a", "b" * 1001]}, "stop", "1,000 characters"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only with stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "Unrecognized"),
        ({"stream": True, "stream_options": []}, "stream_options", "give an object"),
        ({"best_of": 2}, "best_of", "not supported"),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"logit_bias": {"50256": -100}}, "logit_bias", "not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"frequency_penalty": -0.5}, "frequency_penalty", "not supported"),
        ({"functions": []}, "functions", "Unrecognized request argument supplied: functions"),
    ],
)
def test_a_wrong_body_is_refused_by_the_name_of_the_field(body, param, words):
    with pytest.raises(ValidationError) as refused:
        CompletionRequest.model_validate({"prompt": "a", **body})
    faults = [fault | {"loc": ("body", *fault["loc"])} for fault in refused.value.errors()]
    fault = _fault(RequestValidationError(faults).errors()[0])
    assert (fault.status, fault.param, words in fault.message, "\n" in fault.message) == (400, param, True, False)


def test_what_changes_nothing_is_accepted():
    body = {
        "user": "me",
        "best_of": 1,
        "logit_bias": {},
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "suffix": None,
    }
    assert CompletionRequest.model_validate({"prompt": "a", **body}).n == 1
    assert CompletionRequest.model_validate({"prompt": "a", "seed": -1}).sampling().seed == 2**63 - 1
