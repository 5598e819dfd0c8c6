"""Token ids beyond the embedding: refused where text or the tokenizer by itself gives one, else warned of."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_load_unplaced import refused, rewrite
from tiny_models import VOCABULARY, tiny_bert, tiny_llama
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import BertTokenizer

from qconvert.cli import main
from qconvert.load.hugging_face import load_folder


def configure(folder: Path, file: str, **settings: object) -> Path:
    config = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(config | settings))
    return folder


def with_rows(folder: Path, rows: int, embedding: str = "model.embed_tokens.weight") -> Path:
    """The same checkpoint with fewer rows in its embedding."""
    rewrite(folder, lambda tensors: tensors | {embedding: tensors[embedding][:rows]})
    return configure(folder, "config.json", vocab_size=rows)


def with_token(folder: Path, token: str, *, special: bool = True) -> Path:
    """The same checkpoint with one more token in its tokenizer, beyond the embedding."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(token, special=special)])
    assert tokenizer.token_to_id(token) == VOCABULARY
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def warned(folder: Path, caplog: pytest.LogCaptureFixture) -> str:
    with caplog.at_level(logging.WARNING, "qconvert"):
        load_folder(folder)
    return caplog.text


def test_a_tokenizer_as_large_as_the_embedding_or_smaller_is_nothing_to_speak_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert warned(tiny_llama(tmp_path / "same"), caplog) == ""
    larger = tiny_llama(tmp_path / "larger")
    rewrite(larger, lambda tensors: tensors | {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"].repeat(2, 1)})
    assert warned(configure(larger, "config.json", vocab_size=2 * VOCABULARY), caplog) == ""


@pytest.mark.parametrize("rows", [VOCABULARY - 1, VOCABULARY - 100])
def test_ids_that_text_gives_are_refused(tmp_path: Path, rows: int) -> None:
    said = refused(with_rows(tiny_llama(tmp_path), rows), "QC-INPUT-025")
    assert f"ids up to {VOCABULARY - 1}, but the model's embedding has {rows} rows" in said
    assert f"{VOCABULARY - rows} tokens have none" in said
    assert f"with id {rows}" in said
    assert "resize_token_embeddings" in said


def test_ids_of_word_ends_are_refused(tmp_path: Path) -> None:
    """In WordPiece such a token is found inside a word only."""
    folder = tiny_bert(tmp_path)
    vocabulary = {f"unused{number}": number for number in range(2, VOCABULARY)} | {"[UNK]": 0, "a": 1, "##ing": VOCABULARY}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    tokenizer.save(str(folder / "tokenizer.json"))
    assert f"'##ing' with id {VOCABULARY}" in refused(folder, "QC-INPUT-025")


def test_ids_of_a_tokenizer_that_transformers_makes_of_a_vocabulary_are_refused(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path)
    (folder / "tokenizer.json").unlink()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(VOCABULARY))]
    (folder / "vocab.txt").write_text("\n".join(words))
    configure(folder, "tokenizer_config.json", tokenizer_class=BertTokenizer.__name__)
    assert f"ids up to {VOCABULARY + 4}" in refused(folder, "QC-INPUT-025")


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("tokenizer_config.json", {"pad_token": "<extra>"}),
        ("special_tokens_map.json", {"pad_token": {"content": "<extra>"}}),
        ("tokenizer_config.json", {"chat_template": "{% for m in messages %}<extra>{{ m.content }}{% endfor %}"}),
        ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": "<extra>{{ messages }}"}]}),
    ],
    ids=["padding", "padding in the map", "chat template", "chat templates"],
)
def test_ids_that_are_put_in_are_refused(tmp_path: Path, file: str, settings: dict[str, object]) -> None:
    folder = configure(with_token(tiny_llama(tmp_path), "<extra>"), file, **settings)
    assert f"'<extra>' with id {VOCABULARY}" in refused(folder, "QC-INPUT-025")


def test_ids_of_a_chat_templates_own_file_are_refused(tmp_path: Path) -> None:
    folder = with_token(tiny_llama(tmp_path), "<extra>")
    (folder / "chat_template.jinja").write_text("<extra>{{ messages }}")
    assert f"'<extra>' with id {VOCABULARY}" in refused(folder, "QC-INPUT-025")


@pytest.mark.parametrize("special", [True, False])
def test_an_id_that_only_a_text_which_spells_it_out_gives_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, special: bool
) -> None:
    """As in Gemma 3's text models, whose tokenizer has a token for images."""
    said = warned(with_token(tiny_llama(tmp_path), "<image>", special=special), caplog)
    assert f"the tokenizer has ids up to {VOCABULARY}, but the model's embedding has {VOCABULARY} rows" in said
    assert f"spells out '<image>' (id {VOCABULARY})" in said


def test_the_warning_is_shown_by_the_command(tmp_path: Path) -> None:
    folder = with_token(tiny_llama(tmp_path), "<image>")
    result = CliRunner().invoke(main, ["plan", "--model", str(folder), "--output", f"{tmp_path}-out"])
    assert result.exit_code == 0
    assert "spells out '<image>'" in " ".join(result.stderr.split())


def test_an_ordinary_token_that_no_text_gives_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A placeholder in the vocabulary of a BPE tokenizer, which no merge leads to."""
    folder = tiny_llama(tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["unused"] = VOCABULARY
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "spells out 'unused'" in warned(folder, caplog)


def test_a_tokenizer_that_can_not_be_opened_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Data may come as token ids."""
    folder = tiny_llama(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    assert "whether its token ids fit the model is not known" in warned(folder, caplog)


def test_a_git_lfs_pointer_in_its_place_is_refused(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "tokenizer.json" in refused(folder, "QC-INPUT-004")
