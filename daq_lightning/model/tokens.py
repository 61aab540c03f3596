"""Text as the tokens of a model, cut into windows.

    documents  ->  tokens of each, as the tokenizer begins and ends a text  ->  windows of at most `context`

A window is read by itself: within it every token but the first is predicted from those before. The windows of
a document do not overlap, and a last one of a single token is left out, for nothing is predicted in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from daq_lightning.checkpoint.text_file import Document
from daq_lightning.model.from_folder import quiet_and_offline

_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
_ADVICE = "pass a folder with one as --tokenizer"


def load_tokenizer(folders: Sequence[str | os.PathLike[str]], advice: str = _ADVICE) -> Any:
    """The tokenizer of the first folder that has one; no code of the folder is run.

    Args:
        folders: Where to look.
        advice: What to do if there is none, for the error.

    Raises:
        ValueError: None has one, or transformers cannot read it.
    """
    import transformers

    for folder in folders:
        if any((Path(folder) / name).is_file() for name in _VOCABULARIES):
            try:
                with quiet_and_offline():
                    return transformers.AutoTokenizer.from_pretrained(
                        folder, trust_remote_code=False, local_files_only=True
                    )
            except Exception as error:  # foreign input: transformers raises whatever it trips over
                raise ValueError(f"The tokenizer in {folder} cannot be read: {error}") from error
    raise ValueError(
        f"There is no tokenizer ({', '.join(_VOCABULARIES[:3])}, ...) in {' or '.join(map(str, folders))}: "
        f"{advice}."
    )


def windows_of(
    documents: Iterable[Document], tokenizer: Any, context: int, limit: int | None = None
) -> list[list[int]]:
    """The tokens of documents in windows of 2 to `context` tokens.

    Args:
        documents: Texts, and conversations for the tokenizer's chat template.
        tokenizer: Of transformers.
        context: Tokens of a window, at most; 2 or more.
        limit: Stop after so many tokens; None takes all.

    Raises:
        ValueError: Fewer than two tokens in all, or messages that the chat template does not take.
    """
    windows: list[list[int]] = []
    left = limit
    for document in documents:
        if left is not None and left < 2:
            break
        tokens = _tokens(document, tokenizer)[:left]
        cut = [tokens[start : start + context] for start in range(0, len(tokens), context)]
        windows += [window for window in cut if len(window) > 1]
        left = None if left is None else left - len(tokens)
    if not windows:
        raise ValueError(
            "The text has fewer than 2 tokens, so there is none to be predicted: pass more text"
            + ("." if limit is None else f", or a limit above {limit}.")
        )
    return windows


def most_tokens(config: Mapping[str, Any]) -> int | None:
    """Tokens of a text that a model takes, by its config.json; None if that does not say."""
    sizes = [text_field(config, name) for name in ("max_position_embeddings", "n_positions")]
    return next((size for size in sizes if isinstance(size, int)), None)


def text_field(config: Mapping[str, Any], name: str) -> Any:
    """A field of the language model in a config.json, which may hold other models too; None without it."""
    inner = config.get("text_config")
    return config.get(name, inner.get(name) if isinstance(inner, Mapping) else None)


def _tokens(document: Document, tokenizer: Any) -> list[int]:
    with quiet_and_offline():  # without a warning about texts that are longer than a window
        if document.messages is None:
            return _encoded(document, document.text, tokenizer)
        try:
            text = tokenizer.apply_chat_template(document.messages, tokenize=False)
        except Exception as error:  # a template is foreign code, and says what it will
            raise ValueError(
                f"{document.place}: the messages do not fit the tokenizer's chat template: {error}"
            ) from error
        return _encoded(document, text, tokenizer, add_special_tokens=False)


def _encoded(document: Document, text: str | None, tokenizer: Any, **options: Any) -> list[int]:
    try:
        return list(tokenizer(text, **options).input_ids)
    except Exception as error:  # its files are foreign, and may hold anything in any field
        raise ValueError(f"{document.place}: the tokenizer cannot read the text: {error}") from error
