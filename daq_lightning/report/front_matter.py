"""The metadata of a model card: the YAML between two lines `---` that `README.md` begins with.

    ---
    base_model: [org/model]        what the Hub lists the model under
    base_model_relation: quantized
    ---

An existing block is changed as text: only the lines of the keys that are set go, and all others stay as
somebody wrote them (comments, order, `language: no`, which YAML takes for false). Foreign YAML is read into
nodes and never into values, so no alias, tag or date in it does anything. Written with PyYAML, not with
`huggingface_hub.ModelCard`: its bytes would follow that package's version, and its import takes 0.2 s.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import yaml

_BLOCK = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
# characters; cards with the scores of hundreds of tests have some 0.4 million
_LARGEST = 1 << 20
_NULL = "tag:yaml.org,2002:null"


def split_card(card: str) -> tuple[str | None, str]:
    """The YAML of a card, None if it has no such block, and the text below it.

    Example:
        >>> split_card("---\\nlicense: mit\\n---\\n# Title\\n")
        ('license: mit\\n', '# Title\\n')
    """
    found = _BLOCK.match(card)
    return (None, card.removeprefix("\ufeff")) if found is None else (found[1], card[found.end() :])


def read_texts(front: str) -> dict[str, list[str]]:
    """The values that are text or lists of text, each as a list, as they are written.

    Raises:
        ValueError: It is no YAML mapping, a line for each key.

    Example:
        >>> read_texts("language: no\\ntags:\\n- a\\n- b\\n")
        {'language': ['no'], 'tags': ['a', 'b']}
    """
    return {key: texts for key, (_, value) in _entries(front).items() if (texts := _texts(value))}


def merge(front: str, ours: Mapping[str, Any], replaced: Collection[str]) -> str:
    """The metadata with ours added.

    Args:
        front: The existing YAML.
        ours: Key -> value to write, unless the key has a value already.
        replaced: The keys whose existing value goes, whether or not there is one of ours.

    Raises:
        ValueError: It is no YAML mapping, a line for each key.

    Example:
        >>> merge("license: mit\\ntags: [a]\\n", {"license": "other", "tags": ["a", "b"]}, {"tags"})
        'license: mit\\ntags:\\n- a\\n- b\\n'
    """
    entries = _entries(front)
    empty = {key for key, (_, value) in entries.items() if value.tag == _NULL}
    gone = {key for key in entries if key in replaced or (key in empty and key in ours)}
    added = {key: value for key, value in ours.items() if key not in entries or key in gone}
    for key, (name, value) in reversed(entries.items()):
        if key in gone:
            front = front[: name.start_mark.index] + front[_end(front, value) :]
    merged = (front if not front or front.endswith("\n") else front + "\n") + dump(added)
    if set(_entries(merged)) != (set(entries) - gone) | set(added):
        raise ValueError("its lines cannot be taken apart")
    return merged


def check_plain(text: str) -> None:
    """Refuses YAML that is larger when it is read: a few lines of aliases of aliases fill any memory.

    Raises:
        ValueError: It has aliases, more than a million characters, or is no YAML.

    Example:
        >>> check_plain("a: [1, 2]")
    """
    import yaml

    if len(text) > _LARGEST:
        raise ValueError(f"it has more than {_LARGEST} characters")
    try:
        aliased = any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ValueError(f"it is no YAML: {error}") from error
    if aliased:
        raise ValueError("it has aliases (*name), which no recipe needs: write what they stand for")


def dump(content: Mapping[str, Any] | list[dict[str, Any]]) -> str:
    """YAML in blocks, in the order given; nothing for nothing."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Writes a value that is there twice twice, not as an alias."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    plain = dict(content) if isinstance(content, Mapping) else content
    # as wide as it takes: a folded line is hard to read, and to change
    options: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": 1 << 20}
    return yaml.dump(plain, Dumper=Dumper, **options) if content else ""


def _entries(front: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """Key -> the nodes of key and value."""
    import yaml

    if len(front) > _LARGEST:
        raise ValueError(f"it has more than {_LARGEST} characters")
    try:
        root = yaml.compose(front, yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError("it is no YAML") from error
    if root is None:
        return {}
    pairs = root.value if isinstance(root, yaml.MappingNode) and not root.flow_style else [(root, root)]
    names = [name.value for name, _ in pairs]
    plain = all(isinstance(name, yaml.ScalarNode) and name.start_mark.column == 0 for name, _ in pairs)
    if not plain or len(set(names)) != len(names) or root is pairs[0][0]:
        raise ValueError("it is no mapping with a line for each key")
    return {name.value: (name, value) for name, value in pairs}


def _texts(value: yaml.Node) -> list[str]:
    import yaml

    items = value.value if isinstance(value, yaml.SequenceNode) else [value]
    return [item.value for item in items if isinstance(item, yaml.ScalarNode) and item.tag != _NULL]


def _end(front: str, value: yaml.Node) -> int:
    """Where the lines of a value end; comments and blank lines below belong to what follows."""
    end = value.end_mark.index
    if front[end - 1 : end] != "\n":
        end = front.find("\n", end) + 1 or len(front)
    while (line := front.rfind("\n", 0, end - 1) + 1) > value.start_mark.index:
        if front[line:end].strip() and not front[line:end].startswith("#"):
            break
        end = line
    return end
