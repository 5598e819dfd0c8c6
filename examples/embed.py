"""Sentence embeddings from an output folder, with onnxruntime, numpy and tokenizers alone.

    python examples/embed.py out/minilm "A man is eating." "Someone has lunch." "The sky is blue."

Prints how similar each further sentence is to the first: the cosine of their embeddings.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from tokenizers import Tokenizer

MAX_TOKENS = 256  # longer sentences are cut; MiniLM was trained on no more
SENTENCES = (
    "How do I make a model smaller?",
    "Ways to shrink a neural network",
    "Quantization stores weights in fewer bits.",
    "The cat sleeps on the warm roof.",
)


def embed(folder: Path, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
    """[sentences, features]: the mean of each sentence's token states, at length 1."""
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(list(sentences))
    tokens = {
        "input_ids": np.array([encoding.ids for encoding in encodings], np.int64),
        "attention_mask": np.array([encoding.attention_mask for encoding in encodings], np.int64),
        "token_type_ids": np.array([encoding.type_ids for encoding in encodings], np.int64),
    }
    states = session.run(None, {each.name: tokens[each.name] for each in session.get_inputs()})[0]
    mask = tokens["attention_mask"][:, :, None]
    means = (states * mask).sum(1) / mask.sum(1)
    normalised: npt.NDArray[np.float32] = (means / np.linalg.norm(means, axis=1, keepdims=True)).astype(np.float32)
    return normalised


def main() -> None:
    parser = argparse.ArgumentParser(description="How similar sentences are to the first one.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("out/minilm"), help="an encoder that qconvert wrote")
    parser.add_argument("sentences", nargs="*", default=SENTENCES)
    arguments = parser.parse_args()
    first, *others = arguments.sentences
    embeddings = embed(arguments.folder, arguments.sentences)
    print(first)
    for sentence, similarity in zip(others, embeddings[1:] @ embeddings[0], strict=True):
        print(f"{similarity:6.3f}  {sentence}")


if __name__ == "__main__":
    main()
