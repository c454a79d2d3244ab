"""The lists that the pickers of W3, W4 and W6 show: models, chips, types, batches and contexts."""

from collections.abc import Sequence
from functools import lru_cache

from minivllm.course.calculators import (
    Accelerator,
    Worked,
    accelerator,
    accelerators,
    attention_flops,
    kv_bytes_per_token,
    num_active_parameters,
    public_models,
)
from minivllm.course.calculators.model_fields import Config
from minivllm.errors import ConfigError, ModelError

WEIGHT_DTYPES = ("bf16", "fp8", "int8", "int4", "mxfp4")
KV_DTYPES = ("bf16", "fp8", "int8", "int4")
BATCHES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
CONTEXTS = tuple(2**k for k in range(7, 18))  # 128 to 131,072 tokens


@lru_cache
def model_names() -> tuple[str, ...]:
    """Public models whose parameters, K and V the calculators can count."""
    return tuple(name for name, model in public_models().items() if _is_countable(model.config))


def model_options() -> list[tuple[str, str]]:
    return [(name, name) for name in model_names()]


def chip_options() -> list[tuple[str, str]]:
    return [(name, name) for name in accelerators()]


def compute_dtype(chip: str | Accelerator, wanted: str) -> str:
    """The wanted type where the chip has it, else its 16-bit one."""
    rates = accelerator(chip).flops
    return next(name for name in (wanted, "bf16", "fp16", *rates) if name in rates)


def as_words(names: Sequence[str]) -> list[tuple[str, str]]:
    """Options that are their own words."""
    return [(name, name) for name in names]


def ms(time: Worked | float) -> str:
    """A time in milliseconds, to three figures: ms(4.7935) == "4.79 ms"."""
    value = float(time)
    return f"{value:.3g} ms" if value < 1000 else f"{value:,.0f} ms"


def _is_countable(config: Config) -> bool:
    try:
        attention_flops(config, 1)
        return int(kv_bytes_per_token(config)) > 0 and int(num_active_parameters(config)) > 0
    except (ModelError, ConfigError):
        return False
