"""A tiny tokenizer whose tokens are letters, and text for it."""

import json
import random

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LETTERS = " .abcdefghijklmnopqrstuvwxyz\n"
TEMPLATE = "{% for m in messages %}{{ m['role'] + '.' + m['content'] + '\n' }}{% endfor %}"


def save_tokenizer(folder):
    """Token 0 is anything unknown, the letters come after it; what is there of a tokenizer goes."""
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    tokenizer = Tokenizer(
        models.WordLevel({"<unk>": 0} | {c: i for i, c in enumerate(LETTERS, 1)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return folder


def write_text(path, letters=400, seed=0):
    """Words of random letters; in a .jsonl file as texts and conversations of many lengths."""
    choose = random.Random(seed)
    text = "".join(choose.choices(LETTERS[:-1], k=letters))
    if path.suffix == ".jsonl":
        parts, at = [], 0
        while at < letters:
            size = choose.randint(2, 60)
            part, at = text[at : at + size], at + size
            conversation = {"messages": [{"role": "user", "content": part}]}
            parts.append(conversation if choose.random() < 0.5 else {"text": part})
        path.write_text("".join(json.dumps(part) + "\n" for part in parts))
    else:
        path.write_text(text)
    return path
