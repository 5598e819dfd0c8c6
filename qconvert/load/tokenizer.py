"""Text to token ids with the tokenizer that came with a checkpoint; and that the model knows them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qconvert.errors import InputError, in_one_line
from qconvert.ir.model import EncodeText
from qconvert.storage.git_lfs import refuse_git_lfs_pointer
from qconvert.storage.json_text import parse_json

TOKENIZER = "tokenizer.json"
# What transformers can build a tokenizer from where there is no tokenizer.json.
VOCABULARIES = ("vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
SETTINGS = ("special_tokens_map.json", "tokenizer_config.json")
# The tokens of these parts are put in by the tokenizer, or by who makes a batch.
PARTS = tuple(f"{part}_token" for part in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))

log = logging.getLogger("qconvert")


@dataclass(frozen=True, slots=True, eq=False)
class _Tokenizer:
    """The part that the tokenizers of both libraries have in common.

    encode: see TextEncoder. decode: the text of token ids, special ones not left out.
    ids: token -> id, of the whole vocabulary. added: ids of the tokens that are found in a text before it is split.
    """

    encode: EncodeText
    decode: Callable[[list[int]], str]
    ids: Mapping[str, int]
    added: frozenset[int]


class TextEncoder:
    """Encodes a text with special tokens, neither cut nor padded. An EncodeText; the tokenizer is opened when it is needed."""

    def __init__(self, files: Mapping[str, Path | bytes], folder: Path | None) -> None:
        self._files, self._folder = files, folder

    def __call__(self, text: str) -> list[int]:
        """Raises InputError QC-INPUT-018 for a tokenizer that can't be opened."""
        return self._tokenizer.encode(text)

    @cached_property
    def _tokenizer(self) -> _Tokenizer:
        if TOKENIZER in self._files:
            return _open_fast(self._files[TOKENIZER])
        assert self._folder is not None  # see text_encoder
        return _open_with_transformers(self._folder)

    def check_ids(self, rows: int) -> None:
        """Compare the vocabulary with an embedding of so many rows.

        Raises InputError QC-INPUT-025 where text, or the tokenizer by itself, gives an id that has no row: a quantized
        embedding would answer it with zeros. Warns of such ids that only a text which spells out a special token gives.
        """
        try:
            tokenizer = self._tokenizer
        except InputError as error:
            if error.code != "QC-INPUT-018":
                raise
            log.warning("%s; whether its token ids fit the model is not known", error.message)  # other data may do without
            return
        beyond = {number: token for token, number in sorted(tokenizer.ids.items(), key=lambda item: item[1]) if number >= rows}
        if not beyond:
            return
        found = f"the tokenizer has ids up to {max(beyond)}, but the model's embedding has {rows} rows"
        inserted = _inserted(self._files)
        given = next((number for number, token in beyond.items() if _gives(tokenizer, number) or inserted(token)), None)
        if given is None:
            number, token = next(iter(beyond.items()))
            log.warning("%s: a text that spells out %s (id %d) can't be used", found, ascii(token), number)
            return
        raise InputError(
            "QC-INPUT-025",
            f"{found}: {len(beyond)} tokens have none, such as {beyond[given]!a} with id {given}",
            hint="use the tokenizer that the checkpoint was trained with; or, in transformers, call "
            "model.resize_token_embeddings(len(tokenizer)) and save both again",
        )


def _gives(tokenizer: _Tokenizer, number: int) -> bool:
    """Return whether a text gives this id without spelling out a special token. Tried with the token's own text."""
    word = tokenizer.encode("a")
    if number in tokenizer.added:
        return number in word
    letter = [other for other in word if other not in tokenizer.added][:1]
    return any(number in tokenizer.encode(tokenizer.decode([*before, number])) for before in ([], letter))


def _inserted(files: Mapping[str, Path | bytes]) -> Callable[[str], bool]:
    """Return a test for tokens that batches or chats get by themselves: they have a part (padding, ...), or are in the chat
    template.
    """
    settings: list[dict[str, Any]] = []
    for name in SETTINGS:
        if name in files:
            with contextlib.suppress(ValueError):  # its readers say so
                settings.append(parse_json(_bytes(files[name])))
    values = [part for each in settings for name, part in each.items() if name in PARTS]
    parts = [value.get("content") if isinstance(value, dict) else value for value in values]
    templates = [str(each.get("chat_template")) for each in settings]
    templates += [_bytes(content).decode("utf-8", "replace") for name, content in files.items() if name.endswith(".jinja")]
    return lambda token: token in parts or any(token in text for text in templates)


def text_encoder(files: Mapping[str, Path | bytes], folder: Path | None = None) -> TextEncoder | None:
    """Return the encoder of the tokenizer among `files`, None if there is none.

    folder: where transformers may look for tokenizers other than tokenizer.json.
    """
    known = TOKENIZER in files or (folder is not None and any(name in files for name in VOCABULARIES))
    return TextEncoder(files, folder) if known else None


def _open_fast(file: Path | bytes) -> _Tokenizer:
    from tokenizers import Tokenizer

    if isinstance(file, Path):
        refuse_git_lfs_pointer(file)
    try:
        tokenizer = Tokenizer.from_buffer(_bytes(file))
    except Exception as error:  # the library raises bare Exception
        raise _unreadable(str(file) if isinstance(file, Path) else TOKENIZER, error) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return _Tokenizer(
        encode=lambda text: list(tokenizer.encode(text).ids),
        decode=lambda numbers: str(tokenizer.decode(numbers, skip_special_tokens=False)),
        ids=tokenizer.get_vocab(),
        added=frozenset(tokenizer.get_added_tokens_decoder()),
    )


def _open_with_transformers(folder: Path) -> _Tokenizer:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # many kinds, by tokenizer
        raise _unreadable(str(folder), error) from error
    return _Tokenizer(
        encode=lambda text: list(tokenizer(text, truncation=False, padding=False, verbose=False)["input_ids"]),
        decode=lambda numbers: str(tokenizer.decode(numbers, skip_special_tokens=False)),
        ids=tokenizer.get_vocab(),
        added=frozenset(tokenizer.added_tokens_decoder),
    )


def _bytes(file: Path | bytes) -> bytes:
    return file.read_bytes() if isinstance(file, Path) else file


def _unreadable(where: str, error: Exception) -> InputError:
    return InputError(
        "QC-INPUT-018",
        f"the tokenizer in {where} can't be opened: {in_one_line(error)}",
        hint=f"save it again with a current transformers (AutoTokenizer...save_pretrained), which writes {TOKENIZER}",
    )
