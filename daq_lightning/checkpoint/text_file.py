"""Text to judge a model by: one stream in a .txt file, or documents in a .jsonl file.

FILE.txt      the whole file is one document
FILE.jsonl    a JSON object a line: {"text": "..."}, or {"messages": [{"role": ..., "content": ...}, ...]}
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Document(NamedTuple):
    """One of text and messages is there.

    Attributes:
        place: File, and line where there are several, for errors.
        text: The text.
        messages: A conversation, for a chat template.
    """

    place: str
    text: str | None
    messages: list[Mapping[str, Any]] | None = None


def read_documents(path: str | os.PathLike[str]) -> list[Document]:
    """The documents of a file, in its order; empty lines of a .jsonl file are passed over.

    Raises:
        ValueError: No such file, another suffix, not UTF-8, nothing in it, or a line that is no document.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{path}: expected a .txt file (one text) or a .jsonl file (a document each line).")
    if not path.is_file():
        raise ValueError(f"{path} is {'not a file' if path.exists() else 'not there'}.")
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8, for example by "
            "iconv -f latin1 -t utf-8."
        ) from error
    if not content.strip():
        raise ValueError(f"{path} is empty: expected the text to judge the model by.")
    if path.suffix == ".txt":
        return [Document(str(path), content)]
    lines = enumerate(content.split("\n"), 1)
    return [_document(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def _document(line: str, place: str) -> Document:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not valid JSON: {error}.") from error
    if isinstance(found, dict):
        text, messages = found.get("text"), found.get("messages")
        if isinstance(text, str):
            return Document(place, text)
        if isinstance(messages, list) and messages and all(isinstance(part, dict) for part in messages):
            return Document(place, None, messages)
    raise ValueError(
        f'{place} is no document: expected {{"text": "..."}} or {{"messages": [{{"role": ..., "content": '
        f"...}}, ...]}}, got {line.strip():.60}"
    )
