"""The digests of everything that conversions write: a change that is not to change artifacts is run before and after.

    python tests/support/artifact_digests.py BEFORE.json [MODEL ...]      MODEL: a checkpoint to convert beside the tiny ones
    python tests/support/artifact_digests.py BEFORE.json --compare AFTER.json

The same machine, threads and versions have to run both: float sums depend on them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

import qconvert

# report.json and the card hold timings.
TIMED = ("report.json", "README.md")
RECIPES: dict[str, dict[str, Any]] = {
    "absmax": {"quantizer": "absmax", "scheme": "int4-g32"},
    "awq": {"quantizer": "awq", "scheme": "int4-g32-asym"},
    "gptq-tuned": {"quantizer": "gptq", "scheme": "int4-g32", "sequential": True, "tuning": {"steps": 3}},
    "llm-int8": {"quantizer": "llm-int8"},
    "smoothquant": {"quantizer": "smoothquant", "scheme": "int8-channel-a8", "layout": "onnx"},
}
MODELS = {"llama": tiny_llama, "bert": tiny_bert, "gpt2": tiny_gpt2}
# What the recipes above do not reach: an encoder-decoder, convolutions, another provider, a budget, a quantized embedding.
OTHERS: dict[str, dict[str, Any]] = {
    "t5": {"quantizer": "per-channel", "layout": "onnx"},
    "convolutions": {"quantizer": "zero-point", "scheme": "int8-channel-asym", "layout": "onnx"},
    "llama-cuda": {"quantizer": "absmax", "scheme": "int4-g32", "targets": ["cpu", "cuda"]},
    "llama-cuda-a8": {"quantizer": "llm-int8", "targets": ["cuda"], "cuda_dtype": "bfloat16"},
    "llama-auto": {"quantizer": "auto", "budget": "5", "layout": "onnx", "logits": "last"},
    "llama-embedding": {
        "quantizer": "absmax",
        "scheme": "int8-g32",
        "layout": "onnx",
        "rules": [{"pattern": "model.embed_tokens", "scheme": "int8-channel-a8"}],
    },
}
CONVOLUTIONS = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10))
    return layers.eval(), {"input": torch.randn(16, 3, 8, 8)}
"""


def jobs(sources: Path, models: list[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name -> settings of every conversion, its model saved in `sources`."""
    for name, save in {**MODELS, "t5": tiny_t5}.items():
        save(sources / name)
    (sources / "convolutions.py").write_text(CONVOLUTIONS)
    for folder in (*(sources / name for name in MODELS), *models):
        for recipe, settings in RECIPES.items():
            own = {"layout": "onnx"} if folder.name == "gpt2" else {}
            yield f"{folder.name} {recipe}", {"model": str(folder), **settings, **own}
    for name, settings in OTHERS.items():
        folder = sources / name.partition("-")[0]
        yield name, {"model": f"module:{folder}.py:build" if name == "convolutions" else str(folder), **settings}


def digests(settings: Mapping[str, Any], output: Path) -> dict[str, str]:
    """File -> sha256, of all that a conversion writes but timings; of the manifest without the digest of our own code."""
    data = {} if settings["model"].startswith("module:") else {"samples": 8, "length": 32}
    defaults = {"calibration": data, "evaluation": data, "verify": False}
    qconvert.convert(qconvert.Recipe.from_settings({**defaults, **settings, "output": str(output)}))
    found = {}
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        if not path.is_file() or name in TIMED:
            continue
        content = path.read_bytes()
        if name == "qconvert.json":
            manifest = json.loads(content)
            manifest["inputs"] = {key: value for key, value in manifest["inputs"].items() if not key.startswith("code:")}
            manifest["recipe"]["model"] = None
            content = json.dumps(manifest, sort_keys=True).encode()
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def differences(before: Mapping[str, Mapping[str, str]], after: Mapping[str, Mapping[str, str]]) -> list[str]:
    """One line for each file that is not the same on both sides."""
    names = {(job, file) for side in (before, after) for job, files in side.items() for file in files}
    return [
        f"{job}: {file} {before.get(job, {}).get(file, 'is missing')[:12]} -> {after.get(job, {}).get(file, 'is missing')[:12]}"
        for job, file in sorted(names)
        if before.get(job, {}).get(file) != after.get(job, {}).get(file)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("digests", type=Path)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--compare", type=Path)
    arguments = parser.parse_args()
    if arguments.compare:
        lines = differences(json.loads(arguments.digests.read_text()), json.loads(arguments.compare.read_text()))
        print("\n".join(lines) or "the same")
        sys.exit(bool(lines))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in jobs(Path(folder), arguments.models):
            found[name] = digests(settings, Path(folder, "output", name))
            print(name, len(found[name]), "files", flush=True)
    arguments.digests.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
