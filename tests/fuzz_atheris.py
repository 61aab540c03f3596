"""The readers of fuzz.py, guided by coverage of this package; needs `pip install atheris`.

    python tests/fuzz_atheris.py CORPUS -max_total_time=600 -rss_limit_mb=6000

An input is the number of a reader and the content of its file. Half of the time libFuzzer changes it, half of
the time fuzz.py does, which knows what files hold. The run ends at the first finding; libFuzzer writes it to
crash-*, and prints executions and coverage.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import atheris  # pyright: ignore[reportMissingImports]
import torch

with atheris.instrument_imports(include=["daq_lightning"]):
    import daq_lightning.audit.chain
    import daq_lightning.audit.verify
    import daq_lightning.cli
    import daq_lightning.report.html  # noqa: F401
import fuzz


def main() -> None:
    """The command."""
    torch.set_num_threads(1)
    place = Path(tempfile.mkdtemp())
    fuzzer = fuzz.Fuzzer(place.resolve(), 0)
    # those that ask transformers are slow, and most of what they run is not ours
    names = [name for name, reader in fuzzer.readers.items() if reader.share >= 0.5]
    corpus = next(
        (Path(argument) for argument in sys.argv[1:] if not argument.startswith("-")), place / "corpus"
    )
    corpus.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        reader = fuzzer.readers[name]
        (corpus / f"seed-{index}").write_bytes(bytes([index]) + (reader.folder / reader.file).read_bytes())

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        chance = random.Random(seed)
        name = names[data[0] % len(names)] if data else names[0]
        if chance.random() < 0.5:
            try:
                return (data[:1] + fuzzer.readers[name].mutate(data[1:], chance))[:most]
            except Exception:  # no longer a file of its kind
                pass
        return data[:1] + atheris.Mutate(data[1:], most - 1)

    def one(data: bytes) -> None:
        if data:
            fuzzer.one(names[data[0] % len(names)], data[1:])
        if fuzzer.findings:
            raise AssertionError(next(iter(fuzzer.findings)))

    arguments = [argument for argument in sys.argv if argument != str(corpus)]
    atheris.Setup([arguments[0], str(corpus), *arguments[1:]], one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
