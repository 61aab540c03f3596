"""Prints the lower bounds of pyproject.toml as constraints for pip, to test with the oldest versions allowed.

python .ci/lowest.py > lowest.txt && pip install -c lowest.txt -e '.[test]'
"""

import re
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

project = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())["project"]
for requirement in project["dependencies"]:
    name, version = re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?>=([\d.]+).*", requirement).groups()
    print(f"{name}=={version}")
