"""Check all of params.yaml without torch. The limits of this machine are checked by the doctor."""

from pipeline.config.params import Params
from pipeline.config.sections import SECTIONS, CorpusConfig, SweepConfig
from pipeline.data.tokenizer import parse_tokenizer
from pipeline.sweep.search_space import check_space
from pipeline.system.errors import InputError
from pipeline.training.config import RunConfig


def check_params(params: Params) -> None:
    """Raise one InputError that lists all errors in params.yaml."""
    faults = params.unknown_sections(*SECTIONS)
    try:
        params.check(*SECTIONS)
        config, (_, size) = RunConfig.of(params), parse_tokenizer(params.section(CorpusConfig).tokenizer)
        if size:
            config.sized_for(size)
        if (need := config.needs_held_out) and not params.section(CorpusConfig).val_fraction:
            faults.append(f"{need}, but nothing is held out: set corpus.val_fraction above 0")
        check_space(params.section(SweepConfig), params)
    except InputError as error:
        faults.append(str(error).removeprefix(f"{params.path}: "))
    if faults:
        raise InputError(f"{params.path}: {'; '.join(faults)}")
