"""Published claims about KV caches that do not hold, each with the number that a calculator of ours gives.

Each is a public text's, in our words and with its source; they were found while the figures of the course were checked.
"""

from dataclasses import dataclass

from minivllm.course.calculators import (
    Worked,
    kv_bytes_of_sequence,
    kv_bytes_per_token,
    mha_bytes_per_token,
    public_config,
    ratio,
)
from minivllm.course.exercises.exercise import Part, named


@dataclass(frozen=True, slots=True)
class Claim:
    """What was said and where, the number said, and the truth in the same unit."""

    words: str
    source: str
    claimed: float
    unit: str
    worked: Worked
    divisor: float  # from the unit of `worked` to `unit`
    cause: str  # what the claim did wrong

    @property
    def truth(self) -> float:
        return float(self.worked) / self.divisor

    @property
    def conclusion(self) -> str:
        return f"{self.worked.derivation[-1]}; claimed: {self.claimed:g} {self.unit} ({self.source})"

    def part(self) -> Part:
        truth = self.truth
        slips = {f"claim repeated: {self.cause}": self.claimed}
        if self.unit == "times":
            slips |= {
                "ratio upside down": 1 / truth,
                "share for its complement": 100 * (1 - 1 / truth),
                "percent for a factor: 2 times as much is 2, not 200": truth * 100,
                "missing factor 2": truth / 2,
            }
        else:
            binary, name = (1000 / 1024, "KiB for kB") if self.unit == "kB" else (1e9 / 2**30, "GiB for GB")
            slips |= {
                "missing factor 2": truth / 2,
                "one byte for K and V together: they are two numbers of 2 bytes": truth / 4,
                "unit left out": truth * self.divisor,
                name: truth * binary,
            }
        return Part(truth, named(slips), self.unit, label=self.words)


HUNDRED_LAYERS = {**public_config("deepseek-v3"), "num_hidden_layers": 100}

CLAIMS = (
    Claim("The KV cache of Llama-3-70B at 128,000 tokens takes 335 GB.", "StaffML's list of numbers", 335, "GB",
          kv_bytes_of_sequence("llama-3-70b", 128_000), 1e9, "64 query heads give that; 8 KV heads are kept"),
    Claim("Llama-13B needs 1,500 kB for each token.", "a page about vLLM on mintlify.com", 1500, "kB",
          kv_bytes_per_token("llama-13b"), 1e3, "40 layers × 2 × 40 heads × 128 × 2 bytes is little more than half"),
    Claim("Llama-13B needs 3 GB for 2,048 tokens.", "the same page about vLLM on mintlify.com", 3, "GB",
          kv_bytes_of_sequence("llama-13b", 2048), 1e9, "40 layers × 2 × 40 heads × 128 × 2 bytes, times 2,048"),
    Claim("MLA keeps about 10 times less than MHA, for heads as DeepSeek-V2 has them.",
          "question 51 on inference in ffaisal93/ml_and_llm_learning on GitHub", 10, "times",
          ratio(mha_bytes_per_token("deepseek-v2"), kv_bytes_per_token("deepseek-v2")), 1,
          "MHA keeps 2 × 128 heads × 128 numbers a layer, MLA 512 + 64"),
    Claim("MLA with 100 layers, of DeepSeek-V3's sizes, takes 55 GB at 131,072 tokens.", "the blog of heji", 55, "GB",
          kv_bytes_of_sequence(HUNDRED_LAYERS, 131_072), 1e9, "a layer keeps 512 + 64 numbers of 2 bytes"),
)  # fmt: skip
