"""Prints the lowest versions that pyproject.toml promises with one backend, as pip takes them.

python tests/oldest.py jax|torch|tensorflow
"""

import pathlib
import sys
import tomllib

from packaging.requirements import Requirement
from packaging.version import Version


def oldest(backend):
    """The lowest version of each direct dependency with a backend: {name: version}."""
    text = (pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    lowest = {}
    for line in (*project["dependencies"], *project["optional-dependencies"][backend]):
        requirement = Requirement(line)
        bounds = [bound for bound in requirement.specifier if bound.operator != "!="]
        if [bound.operator for bound in bounds] != [">="]:
            raise ValueError(f"A dependency has one bound, the lowest version. Received: {line}")
        version = Version(bounds[0].version)
        lowest[requirement.name] = max(version, lowest.get(requirement.name, version))
    return {name: str(version) for name, version in lowest.items()}


if __name__ == "__main__":
    print(*(f"{name}=={version}" for name, version in oldest(sys.argv[1]).items()))
