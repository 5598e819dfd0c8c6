"""Text from an output folder, token by token, with onnxruntime, numpy and tokenizers alone.

    python examples/generate.py out/smollm2 "The capital of France is"

Greedy: the most likely token is taken every time. The KV cache goes out of one step and into the next.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer


def generate(folder: Path, prompt: str, max_tokens: int) -> Iterator[str]:
    """The pieces of text that follow `prompt`, until the model ends it or `max_tokens` are made."""
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ends = end_tokens(folder)
    tokens = tokenizer.encode(prompt).ids
    shown = tokenizer.decode(tokens)
    new = tokens
    cache = {
        each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32)
        for each in session.get_inputs()
        if each.name.startswith("past_key_values.")
    }
    names = [each.name for each in session.get_outputs()]
    for _ in range(max_tokens):
        feeds = {"input_ids": np.array([new], np.int64), "attention_mask": np.ones((1, len(tokens)), np.int64)}
        outputs = dict(zip(names, session.run(None, feeds | cache), strict=True))
        cache = {name: outputs[name.replace("past_key_values", "present")] for name in cache}
        new = [int(outputs["logits"][0, -1].argmax())]
        if new[0] in ends:
            return
        tokens = tokens + new
        text = tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):  # else the token ends within a character, and the next one completes it
            yield text[len(shown) :]
            shown = text


def end_tokens(folder: Path) -> set[int]:
    """The tokens that end a text."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
        if ends is not None:
            return set(ends) if isinstance(ends, list) else {ends}
    return set()


def main() -> None:
    parser = argparse.ArgumentParser(description="Continue a text.")
    parser.add_argument("folder", type=Path, help="a decoder that qconvert wrote")
    parser.add_argument("prompt", nargs="?", default="The capital of France is")
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_args()
    print(arguments.prompt, end="", flush=True)
    for piece in generate(arguments.folder, arguments.prompt, arguments.max_tokens):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
