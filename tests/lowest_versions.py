"""Prints what pyproject.toml asks for, each at its lowest version, for ``pip install -r``.

torch and Triton come in the tested versions of constraints.txt: their lower bounds are tried apart (docs/lab.md).
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PINNED = "torch==", "triton=="


def requirements() -> list[str]:
    """List the direct requirements of moekit and of its extras, without torch, Triton and moekit itself.

    Example:
        >>> all("==" in lowest(requirement) for requirement in requirements())
        True
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [project["dependencies"], *project["optional-dependencies"].values()]
    return [line for lines in listed for line in lines if not line.startswith(("torch>=", "triton>=", "moekit["))]


def lowest(requirement: str) -> str:
    """Pin a requirement to its lower bound.

    Example:
        >>> lowest("moto[server]>=5.0.13")
        'moto[server]==5.0.13'
    """
    found = re.fullmatch(r"([\w.-]+(?:\[[\w,]+\])?)>=([\d.]+)", requirement)
    if found is None:
        raise ValueError(
            f"{requirement!r} in pyproject.toml has no lower bound alone; expected for example 'rich>=13.9'"
        )
    return f"{found[1]}=={found[2]}"


if __name__ == "__main__":
    tested = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    print(*(line for line in tested if line.startswith(PINNED)), *map(lowest, requirements()), sep="\n")
