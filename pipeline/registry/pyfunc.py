"""Serve a registered version through `mlflow models serve` and `mlflow.pyfunc.load_model`.

MLflow stores a copy of this file in the version and runs it to load the version, so that no pickle is needed. It also
runs the file when it saves the version: torch, whose import takes seconds, is imported only to load a model.
"""

from pathlib import Path

from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from pipeline.model.sampling import Sampling
from pipeline.system.errors import InputError


class PromptModel:
    """Load a version, and predict. The methods have no type hints, since with them MLflow silently drops `params`."""

    def load_context(self, context):  # type: ignore[no-untyped-def]
        from pipeline.model.generator import load_generator

        self.generator = load_generator(Path(context.artifacts["model"]).parent)

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Continue each text of the column `prompt`; MLflow completes `params` with the signature's defaults."""
        try:
            sampling, prompts = Sampling.of(**params), list(model_input["prompt"])
            if nulls := [n for n, prompt in enumerate(prompts, start=1) if not isinstance(prompt, str)]:
                raise InputError(f"prompt {nulls[0]} of {len(prompts)} is null: it should be text")
            return [self.generator.text(prompt, sampling) for prompt in prompts]
        except InputError as error:  # the server then answers with status 400 and this line
            raise MlflowException.invalid_parameter_value(str(error)) from None


class TextGenerator(PromptModel, PythonModel):  # type: ignore[misc]  # mlflow is untyped here
    """The class that MLflow loads. It inherits `predict`: otherwise MLflow warns that type hints are missing."""


set_model(TextGenerator())
