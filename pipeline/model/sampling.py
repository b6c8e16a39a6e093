"""Sample the next token from logits."""

from collections.abc import Sequence
from reprlib import repr as brief
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.system.errors import InputError

if TYPE_CHECKING:
    from torch import Generator, Tensor

StopText = Annotated[str, Field(max_length=1000)]  # each step looks for its beginnings


class Sampling(BaseModel):
    """How to continue a prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens: int = Field(100, ge=0, le=10_000, description="number of tokens to generate")
    temperature: float = Field(
        0.8, ge=0, le=100, description="0: always the most likely token; 1: the model's probabilities"
    )
    top_k: int = Field(0, ge=0, le=65_536, description="sample from the k most likely tokens; 0: from all tokens")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="nucleus sampling: from the fewest tokens whose probabilities add up to top_p; 1: from all",
    )
    repetition_penalty: float = Field(
        1.0, ge=0.1, le=10, description="above 1: tokens that have occurred become less likely; 1: no penalty"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="the same seed gives the same text")
    stop: tuple[StopText, ...] = Field(
        (), max_length=16, description="text before which the continuation ends; give the flag once for each of several"
    )

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Check the values. Raises one InputError that names every invalid one."""
        try:
            return cls(**values)
        except ValidationError as error:
            faults = (f"{fault['loc'][0]} {brief(fault['input'])}: {fault['msg'].lower()}" for fault in error.errors())
            raise InputError("; ".join(faults)) from None


def sample(logits: "Tensor", sampling: Sampling, seen: Sequence[int], generator: "Generator") -> int:
    """Sample a compact id from its fp32 logits (V,) on the CPU; `seen`: the compact ids of the text so far.

    The penalty divides positive logits and multiplies negative ones. Sources: Keskar et al. 2019 (penalty), Fan et al.
    2018 (top-k), Holtzman et al. 2020 (nucleus sampling).
    """
    import torch  # only here: the command line, which starts without torch, builds its options from Sampling

    if (penalty := sampling.repetition_penalty) != 1:
        used = torch.tensor(sorted(set(seen)))
        penalised = torch.where(logits[used] > 0, logits[used] / penalty, logits[used] * penalty)
        logits = logits.index_copy(0, used, penalised)
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = (logits - logits.max()).double() / sampling.temperature
    if 0 < sampling.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -torch.inf)
    probabilities = logits.softmax(dim=0)
    if sampling.top_p < 1:
        descending, order = probabilities.sort(descending=True)
        outside = descending.cumsum(dim=0) - descending >= sampling.top_p  # those before it add up to top_p
        probabilities[order[outside]] = 0
    cumulative = probabilities.cumsum(dim=0)  # one random number, where torch.multinomial takes one for each id
    place = torch.rand(1, generator=generator, dtype=torch.float64) * cumulative[-1]
    found = int(torch.searchsorted(cumulative, place, right=True))
    return found if found < len(cumulative) else int(cumulative.argmax())  # `place` was rounded up to the sum
