"""Checkpoints of the sizes that people have, and what each stage of a command takes with them.

    python tests/bench/sizes.py write FOLDER --shape llama-3.2-1b --tokenizer CHECKPOINT
    python tests/bench/sizes.py measure qconvert run --model FOLDER --output OUT --preset balanced

The weights are random, the shapes are real. They are written tensor by tensor, in shards with an index; `--sparse` writes the
headers alone and leaves holes behind them, which read as zeros and take no disk: enough for `plan`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHARD_BYTES = 5_000_000_000
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")


def llama(
    layers: int, hidden: int, intermediate: int, heads: tuple[int, int], vocabulary: int, *, tied: bool
) -> dict[str, Any]:
    """Return the config.json of a Llama. heads: of queries, of keys and values."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": hidden // heads[0],
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 8192,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": "bfloat16",
    }


SHAPES = {
    "small": llama(8, 1024, 2816, (16, 16), 49152, tied=True),
    "llama-3.2-1b": llama(16, 2048, 8192, (32, 8), 128256, tied=True),
    "llama-3.1-8b": llama(32, 4096, 14336, (32, 8), 128256, tied=False),
    "llama-3.1-70b": llama(80, 8192, 28672, (64, 8), 128256, tied=False),
}


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of every tensor of a Llama."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        yield f"{block}.input_layernorm.weight", (hidden,)
        yield f"{block}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{block}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{block}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{block}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{block}.post_attention_layernorm.weight", (hidden,)
        yield f"{block}.mlp.gate_proj.weight", (intermediate, hidden)
        yield f"{block}.mlp.up_proj.weight", (intermediate, hidden)
        yield f"{block}.mlp.down_proj.weight", (hidden, intermediate)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def write(folder: Path, config: dict[str, Any], tokenizer: Path, *, sparse: bool = False) -> None:
    """Write a checkpoint in bfloat16, with the tokenizer of another."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder / name)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in tensors(config):
        nbytes = 2 * torch.Size(shape).numel()
        if size and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += nbytes
    files = {f"model-{number:05}-of-{len(shards):05}.safetensors": shard for number, shard in enumerate(shards, 1)}
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    for file, shard in files.items():
        _write_shard(folder / file, shard, None if sparse else noise)
    index = {"metadata": {}, "weight_map": {name: file for file, shard in files.items() for name, _ in shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_shard(path: Path, shard: list[tuple[str, tuple[int, ...]]], noise: Tensor | None) -> None:
    """noise: values that all matrices are cut from, each from another place; None leaves holes."""
    header, offset = {}, 0
    for name, shape in shard:
        nbytes = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if noise is None:
            file.truncate(file.tell() + offset)
            return
        for number, (_, shape) in enumerate(shard):
            if len(shape) == 1:
                file.write(_bytes(torch.ones(shape, dtype=torch.bfloat16)))
                continue
            left, start = torch.Size(shape).numel(), 7919 * number
            while left:
                piece = noise[start : start + left]
                file.write(_bytes(piece))
                left, start = left - len(piece), (start + 104_729) % 1_000_003


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def anonymous(pid: int) -> int:
    """Return the anonymous memory of a process and all that it started, in bytes; pages that several share count once."""
    folder, total = Path(f"/proc/{pid}"), 0
    try:
        children = " ".join(path.read_text() for path in folder.glob("task/*/children")).split()
        for line in (folder / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss_Anon:"):
                total = int(line.split()[1]) * 1024
    except OSError:  # it has ended
        return 0
    return total + sum(anonymous(int(child)) for child in children)


def measure(command: list[str]) -> int:
    """Run a command, print the seconds and the peak of anonymous memory of each of its stages, and return its exit status."""
    stages: list[tuple[str, float, int]] = []
    stage, begin, peak = "start", time.perf_counter(), 0
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:

        def watch() -> None:
            nonlocal peak
            while process.poll() is None:
                peak = max(peak, anonymous(process.pid))
                time.sleep(0.25)  # smaps takes a while of many mappings

        watcher = threading.Thread(target=watch)
        watcher.start()
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("qconvert: "):
                stages.append((stage, time.perf_counter() - begin, peak))
                stage, begin, peak = line.removeprefix("qconvert: ").strip(), time.perf_counter(), 0
            else:
                print(line, end="", file=sys.stderr)
        watcher.join()
    stages.append((stage, time.perf_counter() - begin, peak))
    for name, seconds, memory in stages:
        print(f"{name:40} {seconds:8.1f} s {memory / 1e9:8.2f} GB")
    print(f"{'whole':40} {sum(s for _, s, _ in stages):8.1f} s {max(m for *_, m in stages) / 1e9:8.2f} GB")
    return process.returncode


def main() -> None:
    """Write a checkpoint, or measure a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write")
    writing.add_argument("folder", type=Path)
    writing.add_argument("--shape", choices=SHAPES, required=True)
    writing.add_argument("--layers", type=int)
    writing.add_argument("--tokenizer", type=Path, required=True)
    writing.add_argument("--sparse", action="store_true")
    measuring = commands.add_parser("measure")
    measuring.add_argument("run", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    if arguments.command == "measure":
        sys.exit(measure(arguments.run))
    config = SHAPES[arguments.shape] | ({"num_hidden_layers": arguments.layers} if arguments.layers else {})
    write(arguments.folder, config, arguments.tokenizer, sparse=arguments.sparse)


if __name__ == "__main__":
    main()
