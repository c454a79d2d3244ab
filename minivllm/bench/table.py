"""The README's table of figures, made from the committed result file: `python -m minivllm.bench.table`."""

import json
from pathlib import Path

RESULTS = Path(__file__).with_name("results") / "engine_cpu.json"
BEGIN, END = "<!-- benchmark table: begin -->\n", "<!-- benchmark table: end -->"
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


if __name__ == "__main__":
    print(table())
