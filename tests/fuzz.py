"""Mutated files for every reader: a clean error or success, soon, in bounded memory, and nothing else.

    python tests/fuzz.py --inputs 20000 --seed 0               a table; exit code 1 if there was a finding
    python tests/fuzz.py --seconds 600 --only ckpt manifest    as many as fit; findings are kept in --keep

A reader is a folder of valid files, one of which is mutated, and what this package does with the folder.
Files are mutated as bytes and as what they hold: a place of a JSON value, the header of a safetensors file,
an opcode of a pickle. Checksums and fingerprints are made to fit again, as a forger would.

| a finding is | seen by |
| --- | --- |
| another exception than ValueError, OSError, ImportError, which the command shows | the reader |
| more than `SECONDS` | an alarm |
| more than `MEMORY` beyond what there is at the start | the limit of the address space |
| a file written, renamed, removed outside the folder; a process, a connection | audit hooks |
| a file outside that is opened: `SECRET`, which hostile paths point to | audit hooks |
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import io
import json
import os
import pickle
import pickletools
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS, MEMORY = 10.0, 3 << 30
SECRET = Path(tempfile.gettempdir()) / f"fuzz-secret-{os.getuid()}"
CLEAN = (ValueError, OSError, ImportError)
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    128,
    10**7,
    2**31,
    2**60,
    2**63,
    2**64,
    10**15,
    10**400,
    -(10**15),
    0.5,
    1e300,
    float("nan"),
    float("inf"),
    "",
    " ",
    "x",
    "re:(",
    "re:(a+)+$",
    "(.*)*$",
    "(a|aa)+$",
    "[",
    "..",
    "../..",
    "/",
    "/dev/zero",
    "/proc/self/mem",
    str(SECRET),
    f"../../../../../../../../..{SECRET}",
    "a\0b",
    "\ud800",
    "é→",
    "\x1b[2J",
    "kernels-community/x",
    "someone/evil",
    "bfloat16",
    "float32",
    "nan",
    "x" * 5000,
    "fp8",
    "compressed-tensors",
    "block",
    "channel",
    "group",
    "LlamaForCausalLM",
    "CLIPModel",
    "qwen3_moe",
    "F32",
    "F8_E4M3",
    "F8_E8M0",
    "I64",
    [],
    [[]],
    {},
    [1],
    [128, 128],
    [0, 0],
    [2**40],
    [2**40, 2**40],
    [None],
    {"": ""},
    {"x": 1},
    [{}],
]
BYTES = [
    b"",
    b"\0",
    b"\xff",
    b"{",
    b"[",
    b'"',
    b"\n",
    b"\xff" * 8,
    b"\0" * 8,
    (2**60).to_bytes(8, "little"),
    b"null",
    b"[" * 2000,
    b'{"a":' * 900,
    b"9" * 5000,
    str(SECRET).encode(),
]


# What files hold


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a JSON value, as a path of keys and indices."""
    yield path
    pairs = content.items() if isinstance(content, dict) else ()
    pairs = enumerate(content) if isinstance(content, list) else pairs
    for key, value in pairs:
        yield from places(value, (*path, key))


def changed(content: Any, path: tuple[Any, ...], action: str, value: Any) -> Any:
    """A copy with one place replaced, removed, renamed, or with a new neighbour."""
    if not path:
        return value
    content = copy.deepcopy(content)
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    key = path[-1]
    if action == "replace":
        parent[key] = value
    elif action == "remove":
        del parent[key]
    elif isinstance(parent, list):
        parent.append(value)
    else:
        parent[value if isinstance(value, str) else "new"] = parent.pop(key) if action == "rename" else value
    return content


def as_bytes(content: Any) -> bytes:
    """JSON, or bytes as they are."""
    return content if isinstance(content, bytes) else json.dumps(content).encode()


def signed(content: Any) -> Any:
    """A manifest with the fingerprint of its content."""
    if not isinstance(content, dict):
        return content
    content = {key: value for key, value in content.items() if key != "fingerprint"}
    return content | {"fingerprint": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


# Mutations


def mutated_bytes(data: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, cut out, put in or doubled."""
    content = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at, length = chance.randrange(len(content) + 1), chance.choice((1, 1, 2, 8, 64))
        match chance.randrange(6):
            case 0 if at < len(content):
                content[at] = chance.randrange(256)
            case 1 if at < len(content):
                content[at] ^= 1 << chance.randrange(8)
            case 2:
                del content[at : at + length]
            case 3:
                content[at:at] = chance.choice(BYTES)
            case 4:
                content[at:at] = content[at : at + length]
            case 5 if chance.random() < 0.3:
                del content[at:]
    return bytes(content)


def mutated_json(content: Any, chance: random.Random) -> Any:
    """One or two places changed; half of the time near the top, since names of tensors are many and alike."""
    if chance.random() < 0.1:
        return mutated_bytes(as_bytes(content), chance)
    if chance.random() < 0.02:
        return _deep(content, chance)
    for _ in range(chance.choice((1, 1, 2))):
        every = list(places(content))
        tops = [path for path in every if 0 < len(path) <= 2]
        path = chance.choice(tops if tops and chance.random() < 0.5 else every)
        content = changed(content, path, chance.choice(ACTIONS), copy.deepcopy(chance.choice(VALUES)))
    return content


ACTIONS = ("replace", "replace", "replace", "remove", "rename", "add")


def _deep(content: Any, chance: random.Random) -> Any:
    nested: Any = 1
    for _ in range(chance.choice((50, 200, 450, 900))):
        nested = [nested] if chance.random() < 0.5 else {"a": nested}
    paths = [path for path in places(content) if 0 < len(path) <= 2]
    return changed(content, chance.choice(paths), "replace", nested) if paths else nested


def mutated_safetensors(data: bytes, chance: random.Random) -> bytes:
    """The header as JSON, or all as bytes."""
    if chance.random() < 0.3:
        return mutated_bytes(data, chance)
    length = int.from_bytes(data[:8], "little")
    text = as_bytes(mutated_json(json.loads(data[8 : 8 + length]), chance))
    if chance.random() < 0.9:
        length = len(text)
    return length.to_bytes(8, "little") + text + data[8 + int.from_bytes(data[:8], "little") :]


def mutated_pickle(data: bytes, chance: random.Random) -> bytes:
    """Opcodes removed, doubled, moved or put in; or some bytes."""
    if chance.random() < 0.4:
        return mutated_bytes(data, chance)
    starts = [position for _, _, position in pickletools.genops(data) if position is not None]
    parts = [data[start:stop] for start, stop in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(parts))
        match chance.randrange(5):
            case 0:
                del parts[at]
            case 1:
                parts[at:at] = [parts[at]] * chance.choice((1, 1, 50))
            case 2:
                other = chance.randrange(len(parts))
                parts[at], parts[other] = parts[other], parts[at]
            case 3:
                parts[at] = chance.choice(OPCODES)
            case 4:
                parts[at:at] = [chance.choice(OPCODES)]
        parts = parts or [b"."]
    return b"".join(parts)


def _number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


OPCODES = [
    *map(_number, (0, 1, -1, 7, 2**31, 2**40, 2**62, 2**63, -(2**63), 2**200, 10**400)),
    *(pickle.dumps(value, 2)[2:-1] for value in (None, True, 1e300, "", str(SECRET), "x", b"x")),
    b"cos\nsystem\n",
    b"cbuiltins\nexec\n",
    b"ctorch\nSize\n",
    b"cpathlib\nPosixPath\n",
    b"R",
    b"b",
    b"(",
    b"t",
    b"l",
    b"}",
    b"]",
    b")",
    b"a",
    b"e",
    b"s",
    b"u",
    b"0",
    b"2",
    b"Q",
    b"\x81",
    b"\x85",
    b"\x86",
    b"\x87",
    b"o",
    b"1",
    b"h\0",
    b"q\0",
    b"\x94",
    b"\x93",
    b"K\1((((((((((tttttttttt",
    b"]2a",
    b"K\1" + b"\x852\x86" * 40,
]


def mutated_archive(data: bytes, chance: random.Random) -> bytes:
    """A record of a .ckpt file, written again with a checksum that fits; or some bytes."""
    if chance.random() < 0.2:
        return mutated_bytes(data, chance)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                content = mutated_pickle(content, chance)
            elif chance.random() < 0.02:
                content = mutated_bytes(content, chance)
            new.writestr(name, content)
    return buffer.getvalue()


def mutated_yaml(data: bytes, chance: random.Random) -> bytes:
    """Lines as a mapping, with tags, anchors and values that YAML reads otherwise; or some bytes."""
    if chance.random() < 0.3:
        return mutated_bytes(data, chance)
    lines = data.decode().splitlines()
    for _ in range(chance.choice((1, 1, 2))):
        at = chance.randrange(len(lines))
        key = lines[at].partition(":")[0]
        lines[at] = f"{key}: {chance.choice([*YAML, *map(str, VALUES)])}"
    return "\n".join(lines).encode("utf-8", "surrogatepass")


BOMB = "[" + ",".join(f"&a{i} [{','.join([f'*a{i - 1}'] * 10) if i else '0'}]" for i in range(9)) + "]"
YAML = [
    "!!python/object/apply:os.system [id]",
    "!!python/name:os.system ''",
    "&a [*a]",
    "*x",
    "<<: {a: 1}",
    BOMB,
    "2001-01-01",
    "!!binary aGk=",
    "{class_path: os.system, init_args: {command: id}}",
    "[",
    "1e400",
    "0x10",
    "!!set {a}",
    "|",
]


def mutated_text(data: bytes, chance: random.Random) -> bytes:
    """Some bytes; or the YAML between two lines of a model card."""
    text = data.decode()
    if text.startswith("---\n") and chance.random() < 0.7:
        front, _, rest = text.removeprefix("---\n").partition("\n---\n")
        return b"---\n" + mutated_yaml(front.encode(), chance) + f"\n---\n{rest}".encode()
    return mutated_bytes(data, chance)


def of_json(data: bytes, chance: random.Random) -> bytes:
    """Of a JSON file."""
    return as_bytes(mutated_json(json.loads(data), chance))


def of_manifest(data: bytes, chance: random.Random) -> bytes:
    """Of a manifest, whose fingerprint mostly fits."""
    content = mutated_json(json.loads(data), chance)
    return as_bytes(signed(content) if chance.random() < 0.9 else content)


# The readers


@dataclass(frozen=True)
class Reader:
    """What this package does with a folder of files.

    Attributes:
        folder: Of valid files.
        file: The one that is mutated.
        mutate: How.
        read: What is done.
        share: How often, beside others; those that ask transformers are slow.
    """

    folder: Path
    file: str
    mutate: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path], object]
    share: float = 1.0


def readers(place: Path) -> dict[str, Reader]:
    """All readers, on files that are made in a place."""
    import peft
    import tiny_models
    import torch
    import torch.distributed.checkpoint as dcp
    import transformers

    from daq_lightning import ExportReport, ScaleSearch, export_checkpoint
    from daq_lightning.audit.chain import Chain
    from daq_lightning.audit.verify import checklist, run_checks
    from daq_lightning.checkpoint.adapter import AdapterFolder
    from daq_lightning.checkpoint.fingerprint import fingerprint
    from daq_lightning.checkpoint.folder import companion_files, read_card
    from daq_lightning.checkpoint.lightning_file import read_lightning_checkpoint
    from daq_lightning.checkpoint.manifest import Manifest, foreign_files
    from daq_lightning.checkpoint.reader import Checkpoint
    from daq_lightning.checkpoint.text_file import read_documents
    from daq_lightning.cli import main
    from daq_lightning.model.from_folder import FolderModel
    from daq_lightning.model.tokens import load_tokenizer, windows_of
    from daq_lightning.report.front_matter import merge, read_texts, split_card
    from daq_lightning.report.html import page
    from daq_lightning.report.text import table

    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "head_dim": 16,
        "vocab_size": 16,
    }
    save = {"max_shard_size": "20KB"}
    base, post = tiny_models.make_pair(place, lambda: tiny_models.llama(**small), save=save)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 3})
    peft.get_peft_model(model, lora).save_pretrained(place / "adapter")
    search = ScaleSearch(n_coarse=2, n_fine=1)
    export_checkpoint(post, base, place / "fp8", search=search, max_shard_bytes=10_000)
    export_checkpoint(post, base, place / "nvfp4", search=search, scheme="NVFP4A16")
    rows = {
        "a.weight": torch.linspace(-1, 1, 2048).view(8, 256),
        "b.weight": torch.linspace(-1, 2, 2048).view(16, 128),
    }
    export_checkpoint(rows, rows, place / "int4", search=search, scheme="W4A16_ASYM")
    export_checkpoint(post, place / "fp8", place / "next", search=search, chain_from="deployed")
    (place / "bnb").mkdir()
    shutil.copy(
        Path(__file__).parent / "checkpoint" / "bitsandbytes.safetensors", place / "bnb" / "model.safetensors"
    )
    state = {"model.a": torch.arange(12.0).view(3, 4).bfloat16(), "model.b": torch.ones(2, dtype=torch.int64)}
    (place / "ckpt").mkdir()
    torch.save(
        {"state_dict": state, "epoch": 1, "hyper_parameters": {"p": Path("x")}}, place / "ckpt" / "a.ckpt"
    )
    dcp.save({"state_dict": state}, checkpoint_id=place / "sharded" / "a.ckpt", no_dist=True)
    piece = next((place / "sharded" / "a.ckpt").glob("*.distcp")).name
    (place / "text").mkdir()
    (place / "text" / "a.jsonl").write_text(
        '{"text": "one two"}\n{"messages": [{"role": "user", "content": "x"}]}\n'
    )
    _make_tokenizer(place / "tokenizer")
    (place / "card").mkdir()
    (place / "card" / "README.md").write_text(
        "---\nlicense: mit\ntags:\n- a\nbase_model: x/y\n---\n# Title\n"
    )

    def all_tensors(folder: Path) -> None:
        checkpoint = Checkpoint(folder)
        for name in checkpoint:
            checkpoint[name]

    def outline(folder: Path) -> None:
        checkpoint = Checkpoint(folder)
        FolderModel(folder, len(checkpoint.raw)).outline(list(checkpoint))
        companion_files(folder)

    def check(folder: Path) -> None:
        checklist(run_checks(folder))

    def adapter(folder: Path) -> None:
        adapter, weights = AdapterFolder(folder), Checkpoint(base)
        adapter.unused(weights)
        for name in adapter.names:
            if name in weights:
                adapter.merged(name, weights[name])

    def manifest(folder: Path) -> None:
        Manifest.load(folder).stored()
        foreign_files(folder)
        chain = Chain.open(folder)
        chain.verify()
        chain.table()

    def report(folder: Path) -> None:
        found = ExportReport.load(folder)
        found.summary()
        table(found, None)
        page(found)

    def prints(tensors: Any) -> None:
        for name in tensors:
            fingerprint(tensors[name])

    def recipe(folder: Path) -> None:
        quiet = io.StringIO()
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            command = [
                "quantize",
                "--config",
                str(folder / "recipe.yaml"),
                "--dry-run",
                "--out",
                str(folder / "out"),
            ]
            try:
                code = main(command)
            except SystemExit as end:  # of the parser, which has said what is wrong
                code = end.code
        if code not in (0, 1, 2):
            raise AssertionError(f"exit code {code}: {quiet.getvalue()[-800:]}")

    def tokenizer(folder: Path) -> None:
        documents = read_documents(place / "text" / "a.jsonl")
        windows_of(documents, load_tokenizer([folder]), 8)

    def card(folder: Path) -> None:
        front, _ = split_card(read_card(folder))
        read_texts(front or "")
        merge(front or "", {"license": "other", "tags": ["b"]}, {"tags"})

    def ckpt(folder: Path) -> None:
        prints(read_lightning_checkpoint(folder / "a.ckpt"))

    def first(folder: Path) -> str:
        return min(path.name for path in folder.glob("*.safetensors"))

    def one(name: str) -> Reader:
        return Reader(place / name, "model.safetensors", mutated_safetensors, all_tensors)

    fp8, adapters, tokens, sharded = (place / name for name in ("fp8", "adapter", "tokenizer", "sharded"))
    return {
        "safetensors": Reader(base, first(base), mutated_safetensors, all_tensors),
        "safetensors fp8": Reader(fp8, first(fp8), mutated_safetensors, all_tensors),
        "safetensors int4": one("int4"),
        "safetensors bitsandbytes": one("bnb"),
        "index": Reader(base, "model.safetensors.index.json", of_json, all_tensors),
        "config": Reader(base, "config.json", of_json, outline, 0.3),
        "config fp8": Reader(fp8, "config.json", of_json, check, 0.3),
        "config nvfp4": Reader(place / "nvfp4", "config.json", of_json, all_tensors),
        "adapter_config": Reader(adapters, "adapter_config.json", of_json, adapter),
        "adapter_model": Reader(adapters, "adapter_model.safetensors", mutated_safetensors, adapter),
        "manifest": Reader(fp8, "daq_manifest.json", of_manifest, manifest),
        "report": Reader(fp8, "daq_report.json", of_json, report, 0.5),
        "recipe": Reader(fp8, "recipe.yaml", mutated_yaml, recipe, 0.1),
        "card": Reader(place / "card", "README.md", mutated_text, card),
        "ckpt": Reader(place / "ckpt", "a.ckpt", mutated_archive, ckpt, 2.0),
        "sharded ckpt": Reader(sharded, "a.ckpt/.metadata", mutated_pickle, ckpt),
        "sharded pieces": Reader(sharded, f"a.ckpt/{piece}", mutated_bytes, ckpt, 0.3),
        "tokenizer": Reader(tokens, "tokenizer.json", of_json, tokenizer, 0.2),
        "tokenizer_config": Reader(tokens, "tokenizer_config.json", of_json, tokenizer, 0.2),
        "text": Reader(
            place / "text", "a.jsonl", mutated_text, lambda folder: read_documents(folder / "a.jsonl")
        ),
    }


def _make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2, "x": 3}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder)


# The watch


class Watch:
    """Notes what a read does besides reading: by audit hooks, which cannot be taken off again.

    Args:
        allowed: Where it may write.
    """

    ACTS = (
        "subprocess.Popen",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.fork",
        "socket.connect",
        "ctypes.dlopen",
    )
    CHANGES = (
        "os.rename",
        "os.remove",
        "os.rmdir",
        "os.mkdir",
        "os.link",
        "os.symlink",
        "os.truncate",
        "os.chmod",
        "shutil.rmtree",
        "shutil.move",
    )

    def __init__(self, allowed: tuple[Path, ...]) -> None:
        self.allowed = (*(str(path) for path in allowed), os.devnull)
        self.on, self.seen = False, list[str]()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in self.ACTS:
            self.seen.append(f"{event} {arguments!r:.120}")
        elif event == "open" and not isinstance(arguments[0], int):
            path, _, flags = arguments
            path = os.path.realpath(os.fsdecode(path))
            if path == str(SECRET):
                self.seen.append("opened the secret")
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) and not path.startswith(
                self.allowed
            ):
                self.seen.append(f"opened {path} to write")
        elif event in self.CHANGES:
            # where the last argument is the descriptor of a folder, the path is relative to that
            within = arguments[-1] if len(arguments) > 1 and type(arguments[-1]) is int else -1
            folder = (
                os.readlink(f"/proc/self/fd/{within}")
                if event in ("os.remove", "os.rmdir") and within >= 0
                else ""
            )
            path = os.path.realpath(os.path.join(folder, os.fsdecode(arguments[0])))
            if not path.startswith(self.allowed):
                self.seen.append(f"{event} {path}")


class TooLongError(BaseException):
    """The alarm."""


def _place() -> str:
    """Where the error that is handled was raised, by the last line of this package that was on its way."""
    frames = [frame for frame in traceback.extract_tb(sys.exc_info()[2]) if "daq_lightning" in frame.filename]
    return f"in {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "in this program"


class Fuzzer:
    """Gives mutated files to readers.

    Args:
        place: Where files are made.
        seed: Of the mutations.
        keep: Where findings go; None keeps none.
    """

    def __init__(self, place: Path, seed: int, keep: Path | None = None) -> None:
        SECRET.write_text('{"secret": 1}')
        self.chance, self.keep = random.Random(seed), keep
        self.readers = readers(place / "made")
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.watch = Watch((place, Path(tempfile.gettempdir()) / "tmp", cache))
        self.place = place
        self.findings: dict[str, list[str]] = {}
        self.outcomes: dict[str, Counter[str]] = {name: Counter() for name in self.readers}
        for name, reader in self.readers.items():  # what is imported late is imported now
            with contextlib.suppress(*CLEAN):
                reader.read(reader.folder)
            assert name
        signal.signal(signal.SIGALRM, self._alarm)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))

    def one(self, name: str, content: bytes | None = None) -> None:
        """One mutated file; a finding is noted."""
        reader = self.readers[name]
        file = reader.folder / reader.file
        original = file.read_bytes()
        content = reader.mutate(original, self.chance) if content is None else content
        file.write_bytes(content)
        self.watch.seen.clear()
        started = time.monotonic()
        try:
            outcome = self._read(reader)
        finally:
            if file.is_symlink():
                file.unlink()
            file.write_bytes(original)
        seconds = time.monotonic() - started
        if self.watch.seen:
            outcome = f"FINDING {self.watch.seen[0]}"
        self.outcomes[name]["finding" if outcome.startswith("FINDING") else outcome] += 1
        self.outcomes[name]["slowest ms"] = max(self.outcomes[name]["slowest ms"], round(1000 * seconds))
        if outcome.startswith("FINDING"):
            kept = ""
            if self.keep is not None:
                self.keep.mkdir(parents=True, exist_ok=True)
                kept = str(self.keep / f"{name.replace(' ', '-')}-{sum(map(len, self.findings.values()))}")
                Path(kept).write_bytes(content)
            self.findings.setdefault(f"{name}: {outcome.removeprefix('FINDING ')}", []).append(kept)

    def _read(self, reader: Reader) -> str:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        self.watch.on = True
        try:
            reader.read(reader.folder)
        except CLEAN as error:
            return "refused" if str(error).strip() else "FINDING an error without words"
        except TooLongError:
            return f"FINDING took more than {SECONDS:g} s {_place()}"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return f"FINDING {type(error).__name__} {_place()}: {error!s:.150}"
        finally:
            self.watch.on = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        return "read"

    def _alarm(self, *_: Any) -> None:
        raise TooLongError

    def run(self, names: list[str], inputs: int | None, seconds: float | None) -> int:
        """So many inputs, or as many as fit in some seconds; how many there were."""
        begin, count = time.monotonic(), 0
        weights = [self.readers[name].share for name in names]
        while (inputs is None or count < inputs) and (seconds is None or time.monotonic() - begin < seconds):
            self.one(self.chance.choices(names, weights)[0])
            count += 1
        return count


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    if options.inputs is None and options.seconds is None:
        options.inputs = 20_000
    with tempfile.TemporaryDirectory() as scratch:
        fuzzer = Fuzzer(Path(scratch).resolve(), options.seed, options.keep)
        begin = time.monotonic()
        count = fuzzer.run(options.only or list(fuzzer.readers), options.inputs, options.seconds)
        taken = time.monotonic() - begin
    for name, seen in fuzzer.outcomes.items():
        print(f"{name:26}", "  ".join(f"{key} {value}" for key, value in sorted(seen.items())))
    for finding, kept in fuzzer.findings.items():
        print(f"{len(kept)} x {finding} {kept[0]}")
    print(f"{count} inputs in {taken:.0f} s, {len(fuzzer.findings)} findings")
    return 1 if fuzzer.findings else 0


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    root = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(root), str(root / "tests")]
    raise SystemExit(main())
