"""The command line as the parser takes it."""

from __future__ import annotations


def normalized(argv: list[str]) -> list[str]:
    """Accepts underscores in names of options, and reads --config first, so that other options go before."""
    options = [
        part if not part.startswith("--") or part.startswith("--print") else _dashed(part) for part in argv
    ]
    for index, part in enumerate(options[1:], 1):
        width = 2 if part == "--config" else 1
        if part.partition("=")[0] == "--config":
            return [options[0], *options[index : index + width], *options[1:index], *options[index + width :]]
    return options


def _dashed(option: str) -> str:
    name, equals, value = option.partition("=")
    return name.replace("_", "-") + equals + value
