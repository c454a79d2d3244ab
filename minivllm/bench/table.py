"""The README's tables of figures, made from committed result files: `python -m minivllm.bench.table` writes them."""

import json
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).with_name("results") / "engine_cpu.json"
BEGIN, END = "<!-- benchmark table: begin -->\n", "<!-- benchmark table: end -->"
POLICY_RESULTS = Path(__file__).with_name("results") / "policies_cpu.json"
POLICY_BEGIN, POLICY_END = "<!-- policy table: begin -->\n", "<!-- policy table: end -->"
KERNEL_RESULTS = Path(__file__).with_name("results") / "kernels_h200.json"
KERNEL_BEGIN, KERNEL_END = "<!-- kernel table: begin -->\n", "<!-- kernel table: end -->"
GPU_RESULTS = Path(__file__).with_name("results") / "engine_h200.json"
GPU_OTHERS = tuple(
    GPU_RESULTS.with_stem(f"engine_h200_{commit}") for commit in ("5e33753", "db4e159", "5293de2", "05df837")
)  # whole runs, too
GPU_TEXT = GPU_RESULTS.with_stem("text_h200")
GPU_BEGIN, GPU_END = "<!-- gpu table: begin -->\n", "<!-- gpu table: end -->"
CONVERSIONS = Path(__file__).parents[1] / "lab" / "conversions"
CONVERSION_BEGIN, CONVERSION_END = "<!-- conversion table: begin -->\n", "<!-- conversion table: end -->"
LABELS = {"what", "unit"}


def table(path: Path = RESULTS) -> str:
    """Markdown: one line for each measurement, then where it comes from."""
    result = json.loads(path.read_text())
    lines = ["| what | figures |", "| --- | --- |"]
    for row in result["rows"]:
        figures = ", ".join(f"{name} {value}" for name, value in row.items() if name not in LABELS)
        lines.append(f"| {row['what']} ({row['unit']}) | {figures} |")
    facts = result["provenance"]
    versions = f"torch {facts['torch']}, transformers {facts['transformers']}, commit {facts['commit']}"
    source = (
        f"\n{facts['machine']}, {facts['threads']} threads, {versions}, seed {facts['seed']}: `{facts['command']}`\n"
    )
    return "\n".join(lines) + "\n" + source


def kernel_table(path: Path = KERNEL_RESULTS) -> str:
    """Markdown: a line for each kernel and shape, with its fastest rival; then the roofs and where it comes from."""
    result = json.loads(path.read_text())
    lines = ["| kernel and shape | us | speed | of the roof | target | met | fastest rival, us |", "| --- " * 7 + "|"]
    for row in result["rows"]:
        rivals = sorted(row["rivals_us"].items(), key=lambda rival: rival[1])
        fastest = " ".join(map(str, rivals[0])) if rivals else ""
        is_met = {True: "yes", False: "no", None: ""}[row["is_met"]]
        cells = (row["what"], row["us"], f"{row['speed']} {row['unit']}", row["share"], row["target"], is_met, fastest)
        lines.append("".join(f"| {cell} " for cell in cells) + "|")
    facts, roofs = result["provenance"], result["roofs"]["before"]
    source = (
        f"\n{facts['gpu']}, roofs in the same process: copy {roofs['copy_gbps']:.0f} GB/s, "
        f"bf16 product {roofs['gemm_tflops']:.0f} TFLOP/s; torch {facts['torch']}, triton {facts['triton']}, "
        f"commit {facts['commit']}: `{facts['command']}`\n"
    )
    return "\n".join(lines) + "\n" + source


def gpu_table(path: Path = GPU_RESULTS, others: Sequence[Path] = GPU_OTHERS, text: Path = GPU_TEXT) -> str:
    """Markdown: a line for each workload of the engine on a GPU, its floor, other whole runs; then the real text."""
    result, real = json.loads(path.read_text()), json.loads(text.read_text())
    beside = [json.loads(other.read_text()) for other in others]
    taken = [{(row["model"], row["what"]): row["best_s"] for row in other["rows"]} for other in beside]
    head = (
        "| model and workload | seconds, best | tokens/s | floor, seconds | share of the floor | other runs, seconds |"
    )
    lines = [head, "| --- " * 6 + "|"]
    for row in (*result["rows"], *real["rows"]):
        name = f"{row['model']}, {row['what']}" + (f" ({row['note']})" if "note" in row else "")
        also = ", ".join(str(best_s[key]) for best_s in taken if (key := (row["model"], row["what"])) in best_s)
        cells = (name, row["best_s"], f"{row['tokens/s']:,.0f}", row["floor_s"], row["share of floor"], also)
        lines.append("".join(f"| {cell} " for cell in cells) + "|")
    facts, gpu, said = result["provenance"], result["rows"][0]["roofs"]["name"], real["provenance"]
    *most, last = (other["provenance"]["commit"] for other in beside)
    commits = f"{', '.join(most)} and {last}"
    source = (
        f"\n{gpu}, random weights in bf16, torch {facts['torch']}, commit {facts['commit']}, seed {facts['seed']}: "
        f"`{facts['command']}` ({facts['note']}). Other runs: other H200s, commits {commits}. Text: SmolLM2's weights, "
        f"commit {said['commit']}: `{said['command']}`\n"
    )
    return "\n".join(lines) + "\n" + source


def conversion_table(folder: Path = CONVERSIONS) -> str:
    """Markdown: a line for each attention of one model's weights, then where bytes, speeds and losses come from."""
    tuned = json.loads((folder / "tuned_h200.json").read_text())
    measured = json.loads((folder / "measured_h200.json").read_text())
    after = {row["variant"]: row for row in tuned["rows"]}
    lines = [
        "| attention | numbers a layer keeps of a token | bytes per token | loss before tuning | after "
        "| tokens/s, 1 request | 32 |",
        "| --- " * 7 + "|",
    ]
    for row in measured["measured"]:
        losses = (f"{after[row['variant']][when]['all']:.3f}" for when in ("before", "after"))
        speeds = (f"{speed:.0f}" for speed in row["tokens_per_s"].values())
        cells = (row["variant"], f"{row['numbers_per_layer']:,}", f"{row['bytes_per_token']:,}", *losses, *speeds)
        lines.append("".join(f"| {cell} " for cell in cells) + "|")
    facts, here = tuned["provenance"], measured["provenance"]
    num_tokens = max(row["num_tokens"] for row in tuned["rows"])
    source = (
        f"\nLosses in nats per token, tuned on {num_tokens / 1e6:.0f} million tokens: {facts['device']}, torch "
        f"{facts['torch']}, transformers {facts['transformers']}, commit {facts['commit']}, seed {facts['seed']}: "
        f"`{facts['command']}`. Bytes and speeds, which hang on kernel launches at this size: {here['device']}, commit "
        f"{here['commit']}: `{here['command']}`\n"
    )
    return "\n".join(lines) + "\n" + source


def write_into(readme: Path) -> None:
    """Put every table into its place between two comments."""
    text = readme.read_text()
    for begin, end, made in (
        (BEGIN, END, table()),
        (POLICY_BEGIN, POLICY_END, table(POLICY_RESULTS)),
        (KERNEL_BEGIN, KERNEL_END, kernel_table()),
        (GPU_BEGIN, GPU_END, gpu_table()),
        (CONVERSION_BEGIN, CONVERSION_END, conversion_table()),
    ):
        head, rest = text.split(begin)
        text = head + begin + made + end + rest.split(end, 1)[1]
    readme.write_text(text)


if __name__ == "__main__":
    write_into(Path(__file__).parents[2] / "README.md")
