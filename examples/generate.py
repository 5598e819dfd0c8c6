"""Text from an output folder, token by token, with onnxruntime, numpy and tokenizers alone.

    python examples/generate.py out/smollm2 "The capital of France is"
    python examples/generate.py out/t5-small "translate English to German: The house is small."

Greedy: the most likely token is taken every time. The KV cache goes out of one step and into the next. A decoder goes on
with the prompt; an encoder-decoder reads it once, and answers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer


def generate(folder: Path, prompt: str, max_tokens: int) -> Iterator[str]:
    """The pieces of text that follow `prompt`, until the model ends it or `max_tokens` are made."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ends = end_tokens(folder)
    tokens = tokenizer.encode(prompt).ids
    source = {}
    if (folder / "encoder.onnx").exists():
        session, source = open_session(folder / "decoder.onnx"), encode(folder, tokens)
        tokens = [start_token(folder)]
    else:
        session = open_session(folder / "model.onnx")
    shown = tokenizer.decode(tokens)
    new = tokens
    cache = {
        each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32)
        for each in session.get_inputs()
        if each.name.startswith("past_key_values.")
    }
    names = [each.name for each in session.get_outputs()]
    for _ in range(max_tokens):
        read = source or {"attention_mask": np.ones((1, len(tokens)), np.int64)}
        feeds = {"input_ids": np.array([new], np.int64), **read, **cache}
        outputs = dict(zip(names, session.run(None, feeds), strict=True))
        cache = {name: outputs[name.replace("past_key_values", "present")] for name in cache}
        new = [int(outputs["logits"][0, -1].argmax())]
        if new[0] in ends:
            return
        tokens = tokens + new
        text = tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):  # else the token ends within a character, and the next one completes it
            yield text[len(shown) :]
            shown = text


def encode(folder: Path, tokens: list[int]) -> dict[str, np.ndarray]:
    """What the decoder has to know of the source, the same at every step: the keys and values that it attends to."""
    session = open_session(folder / "encoder.onnx")
    ids = np.array([tokens], np.int64)
    names = [each.name for each in session.get_outputs()]
    outputs = dict(zip(names, session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)}), strict=True))
    cross = {name: value for name, value in outputs.items() if name.startswith("cross_key_values.")}
    return {"encoder_attention_mask": np.ones_like(ids), **cross}


def open_session(path: Path) -> ort.InferenceSession:
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


def end_tokens(folder: Path) -> set[int]:
    """The tokens that end a text."""
    ends = setting(folder, "eos_token_id")
    return set(ends) if isinstance(ends, list) else {ends} - {None}


def start_token(folder: Path) -> int:
    """The token that an encoder-decoder's decoder begins with."""
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    return int(next(token for name in names if (token := setting(folder, name)) is not None))


def setting(folder: Path, key: str) -> Any:
    """What the model's files say; None if they say nothing."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        found = json.loads(path.read_text(encoding="utf-8")).get(key) if path.exists() else None
        if found is not None:
            return found
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description="Continue a text, or answer it.")
    parser.add_argument("folder", type=Path, help="a decoder or encoder-decoder that qconvert wrote")
    parser.add_argument("prompt", nargs="?", default="The capital of France is")
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_args()
    if not (arguments.folder / "encoder.onnx").exists():
        print(arguments.prompt, end="", flush=True)
    for piece in generate(arguments.folder, arguments.prompt, arguments.max_tokens):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
