"""Answer for a registered version in `mlflow models serve` and `mlflow.pyfunc.load_model`.

MLflow keeps a copy of this file with the version and runs it where the version is loaded, so that nothing is pickled.
"""

from pathlib import Path

from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from pipeline.model.generator import load_generator
from pipeline.model.sampling import Sampling
from pipeline.system.errors import InputError


class Continuing:
    """What a version does; without type hints, since MLflow drops `params` without a word where it finds them."""

    def load_context(self, context):  # type: ignore[no-untyped-def]
        self.generator = load_generator(Path(context.artifacts["model"]).parent)

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Continue each text of the column `prompt`; `params` are complete, by the signature's defaults."""
        try:
            sampling = Sampling.of(**params)
        except InputError as error:  # so that the server answers with its line
            raise MlflowException.invalid_parameter_value(str(error)) from None
        return [self.generator.text(prompt, sampling) for prompt in model_input["prompt"]]


class TextGenerator(Continuing, PythonModel):  # type: ignore[misc]  # mlflow is untyped here
    """The same for MLflow, which warns of a missing hint where `predict` is written, but not where it is inherited."""


set_model(TextGenerator())
