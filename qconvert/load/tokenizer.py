"""Text to token ids with the tokenizer that came with a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path

from qconvert.errors import InputError
from qconvert.ir.model import EncodeText
from qconvert.load.folder import refuse_git_lfs_pointer

TOKENIZER = "tokenizer.json"
# What transformers can build a tokenizer from where there is no tokenizer.json.
VOCABULARIES = ("vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")


def text_encoder(files: Mapping[str, Path | bytes], folder: Path | None = None) -> EncodeText | None:
    """What encodes a text with special tokens, neither cut nor padded; None if no tokenizer is among `files`.

    folder: where transformers may look for tokenizers other than tokenizer.json.
    The tokenizer is opened at the first call, which raises InputError QC-INPUT-018 if that fails.
    """
    open_tokenizer: Callable[[], EncodeText]
    if TOKENIZER in files:
        open_tokenizer = cache(partial(_open_fast, files[TOKENIZER]))
    elif folder is not None and any(name in files for name in VOCABULARIES):
        open_tokenizer = cache(partial(_open_with_transformers, folder))
    else:
        return None
    return lambda text: open_tokenizer()(text)


def _open_fast(file: Path | bytes) -> EncodeText:
    from tokenizers import Tokenizer

    where = str(file) if isinstance(file, Path) else TOKENIZER
    if isinstance(file, Path):
        refuse_git_lfs_pointer(file)
    try:
        tokenizer = Tokenizer.from_buffer(file.read_bytes() if isinstance(file, Path) else file)
    except Exception as error:  # the library raises bare Exception
        raise _unreadable(where, error) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: list(tokenizer.encode(text).ids)


def _open_with_transformers(folder: Path) -> EncodeText:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # many kinds, by tokenizer
        raise _unreadable(str(folder), error) from error
    return lambda text: list(tokenizer(text, truncation=False, padding=False, verbose=False)["input_ids"])


def _unreadable(where: str, error: Exception) -> InputError:
    return InputError(
        "QC-INPUT-018",
        f"the tokenizer in {where} can't be opened: {error}",
        hint=f"save it again with a current transformers (AutoTokenizer...save_pretrained), which writes {TOKENIZER}",
    )
