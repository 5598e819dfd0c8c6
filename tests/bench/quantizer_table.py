"""The measured table of docs/quantizers.md: python tests/bench/quantizer_table.py MODELS DATA

MODELS holds smollm2-offgrid/, DATA calibration.txt and evaluation.txt. Runs `qconvert compare` and puts its result in place.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

DOCS = Path(__file__).parents[2] / "docs" / "quantizers.md"
BEGIN, END = "quantizer_table.py MODELS DATA -->\n", "<!-- end of table -->"

ASYM, SYM, INT8 = "int4-g32-asym", "int4-g32", "int8-channel-a8"
RECIPES: dict[str, dict[str, Any]] = {
    "rounding": {"quantizer": "per-channel", "scheme": ASYM},
    "rounding, clip=mse (`fast`)": {"preset": "fast"},
    "hqq": {"quantizer": "hqq", "scheme": ASYM},
    "nf4": {"quantizer": "nf4", "scheme": "nf4-g64"},
    "nf4, smaller groups": {"quantizer": "nf4", "scheme": "nf4-g32"},
    "awq (`balanced`)": {"quantizer": "awq", "scheme": ASYM},
    "gptq": {"quantizer": "gptq", "scheme": ASYM},
    "gptq, sequential, tuned (`best`)": {"preset": "best"},
    "rounding, symmetric": {"quantizer": "per-channel", "scheme": SYM},
    "awq, symmetric": {"quantizer": "awq", "scheme": SYM},
    "gptq, symmetric": {"quantizer": "gptq", "scheme": SYM},
    "rounding, int8 activations": {"quantizer": "per-channel", "scheme": INT8},
    "llm-int8": {"quantizer": "llm-int8", "scheme": INT8},
    "smoothquant": {"quantizer": "smoothquant", "scheme": INT8},
    "smoothquant, outliers (`int8`)": {"preset": "int8"},
}


def compare(models: Path, data: Path, folder: Path) -> list[dict[str, Any]]:
    """Entries of compare.json, in the order of RECIPES."""
    settings = {
        "model": str(models / "smollm2-offgrid"),
        "output": str(folder / "out"),
        "calibration": {"source": str(data / "calibration.txt"), "samples": 32, "length": 256},
        "evaluation": {"source": str(data / "evaluation.txt"), "samples": 24, "length": 256},
        "recipes": [{"name": f"r{number}", **choice} for number, choice in enumerate(RECIPES.values())],
    }
    (folder / "compare.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "qconvert", "compare", str(folder / "compare.yaml"), "--json"]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    entries: list[dict[str, Any]] = json.loads(run.stdout)["recipes"]
    return entries


def table(entries: list[dict[str, Any]]) -> str:
    lines = [
        "SmolLM2-135M with weights that lie on no grid, the output head in float; calibrated on 32 x 256 tokens, KL to the",
        "float model in ONNX Runtime on 24 x 256 tokens of other prose; two cores, AVX512-VNNI. Seconds are those to quantize",
        "and write; the calibration comes on top, once for all, but is in those of `best`. Speeds are tokens per second.",
        "",
        "| quantizer | scheme | bits | KL | top-1 | seconds | prefill | decode |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in zip(RECIPES, entries, strict=True):
        numbers = f"{entry['average_bits']:.2f} | {entry['kl']:.4f} | {entry['top1']:.3f} | {entry['quantize_seconds']:.0f}"
        speeds = f"{entry['prefill_tokens_per_s']:.0f} | {entry['decode_tokens_per_s']:.0f}"
        lines.append(f"| {name} | {entry['scheme']} | {numbers} | {speeds} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        entries = compare(Path(sys.argv[1]), Path(sys.argv[2]), Path(folder))
    text = DOCS.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    DOCS.write_text(f"{before}{BEGIN}\n{table(entries)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
