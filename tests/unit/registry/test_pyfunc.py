"""What MLflow's server says of invalid requests; integration/test_pyfunc.py has the server itself."""

import pytest
from mlflow.exceptions import MlflowException
from small_models import random_model

from pipeline.config.sections import ModelConfig
from pipeline.data.vocab import Vocabulary
from pipeline.model.generator import PROMPT_CHARACTERS, Generator
from pipeline.registry.pyfunc import PromptModel

SHAPE = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=12, vocab_size=50304, dropout=0.0, fold_vocab=False)


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ("O", {"top_k": -1}, "top_k"),
        ("O" * (PROMPT_CHARACTERS + 1), {}, "1,000,001 characters: 1,000,000 at most"),
        (None, {}, "prompt 2 of 2 is null: it should be text"),
    ],
)
def test_an_invalid_request_gets_status_400_and_one_line(tokenizer, prompt, params, words):
    served = PromptModel()
    served.generator = Generator(random_model(SHAPE, Vocabulary.full(50304), noise=0.3), tokenizer)
    with pytest.raises(MlflowException, match=words) as refused:
        served.predict(None, {"prompt": ["O", prompt]}, {"max_tokens": 1} | params)
    assert refused.value.get_http_status_code() == 400
    assert "\n" not in str(refused.value)
