"""The examples run an output folder with onnxruntime, numpy and tokenizers alone, and compute the right thing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from example_scripts import example, run_alone
from tiny_models import tiny_bert, tiny_llama
from tokenizers import Tokenizer
from transformers import AutoModel

from qconvert import Recipe, convert

SENTENCES = ("A class is a blueprint.", "Strings hold text, and a great many things can be done with them.", "lambda")
PROMPT = "The class statement"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    convert(Recipe(model=str(tiny_bert(folder / "model")), output=folder / "out", verify=False))
    return folder / "out"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    convert(Recipe(model=str(tiny_llama(folder / "model")), output=folder / "out", verify=False))
    return folder / "out"


def greedy_without_cache(folder: Path, prompt: str, steps: int) -> tuple[list[int], list[int]]:
    """(prompt, continuation) in tokens, the whole text run anew for every token."""
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    start = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(prompt).ids
    empty = {
        each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32)
        for each in session.get_inputs()
        if each.name.startswith("past_key_values.")
    }
    tokens = list(start)
    for _ in range(steps):
        ids = np.array([tokens])
        logits = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **empty})[0]
        tokens.append(int(logits[0, -1].argmax()))
    return start, tokens[len(start) :]


# --- embed ---


def test_an_embedding_is_the_mean_of_the_token_states_at_length_1(encoder: Path) -> None:
    found = example("embed").embed(encoder, SENTENCES)
    model = AutoModel.from_pretrained(encoder, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(encoder / "tokenizer.json"))
    with torch.no_grad():
        states = [model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0].mean(0) for text in SENTENCES]
    expected = torch.nn.functional.normalize(torch.stack(states)).numpy()
    np.testing.assert_allclose(found, expected, atol=0.01)  # both quantize activations, with different roundings


def test_an_embedding_does_not_depend_on_the_sentences_beside_it(encoder: Path) -> None:
    embed = example("embed").embed
    together = embed(encoder, SENTENCES)
    alone = np.concatenate([embed(encoder, [sentence]) for sentence in SENTENCES])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_embed_prints_the_similarity_to_the_first_sentence(encoder: Path) -> None:
    lines = run_alone("embed.py", str(encoder), SENTENCES[0], SENTENCES[1], SENTENCES[0])
    assert lines[0] == SENTENCES[0]
    assert lines[1].endswith(SENTENCES[1])
    assert float(lines[1].split()[0]) < 0.99
    assert lines[2].split() == ["1.000", *SENTENCES[0].split()]


# --- generate ---


def test_generate_takes_the_most_likely_token_every_time(decoder: Path) -> None:
    start, new = greedy_without_cache(decoder, PROMPT, 12)
    tokenizer = Tokenizer.from_file(str(decoder / "tokenizer.json"))
    pieces = list(example("generate").generate(decoder, PROMPT, 12))
    assert PROMPT + "".join(pieces) == tokenizer.decode(start + new)
    assert len(pieces) > 1  # as they come, not at the end


def test_generate_stops_at_the_end_token(decoder: Path) -> None:
    start, new = greedy_without_cache(decoder, PROMPT, 12)
    end = next(token for token in new[1:] if token != new[0])
    tokenizer = Tokenizer.from_file(str(decoder / "tokenizer.json"))
    generate = example("generate")
    generate.end_tokens = lambda folder: {end}  # type: ignore[attr-defined]
    assert PROMPT + "".join(generate.generate(decoder, PROMPT, 12)) == tokenizer.decode(start + new[: new.index(end)])


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({"generation_config.json": {"eos_token_id": [2, 3]}, "config.json": {"eos_token_id": 4}}, {2, 3}),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": 4}}, {4}),
        ({"config.json": {"eos_token_id": 0}}, {0}),
        ({"config.json": {}}, set()),
    ],
    ids=["several", "only-in-config", "token-0", "none"],
)
def test_the_end_tokens_are_those_of_the_generation_config_else_of_the_config(
    tmp_path: Path, files: dict[str, object], ends: set[int]
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert example("generate").end_tokens(tmp_path) == ends


def test_generate_prints_prompt_and_continuation(decoder: Path) -> None:
    text = "\n".join(run_alone("generate.py", str(decoder), PROMPT, "--max-tokens", "3"))
    assert text == PROMPT + "".join(example("generate").generate(decoder, PROMPT, 3))
