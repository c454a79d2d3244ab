"""One prompt or many, one SamplingParams or many: what callers may pass, brought into one form."""

from collections.abc import Mapping, Sequence

from minivllm.errors import RequestError
from minivllm.request import SamplingParams
from minivllm.text_engine import Prompt

Params = SamplingParams | Sequence[SamplingParams] | None


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many: a list of integers is one."""
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Sequence):
        return [prompts]
    return [prompts] if prompts and isinstance(prompts[0], int) else list(prompts)  # type: ignore[arg-type, list-item]


def per_prompt(params: Params, num_prompts: int) -> list[SamplingParams]:
    """As many as there are prompts. Raises RequestError for anything else."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if isinstance(params, Sequence) and all(isinstance(p, SamplingParams) for p in params):
        if len(params) == num_prompts:
            return list(params)
        raise RequestError(f"sampling_params has {len(params)} entries for {num_prompts} prompts; give one or as many")
    raise RequestError(f"sampling_params must be SamplingParams or a list of them, not {type(params).__name__}")
