"""The layers: imports point one way, and only the cluster layer knows Ray and DeepSpeed."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TENSORS, TABLES, CLUSTER, JOBS = range(4)
LAYERS = {
    "interventions": TENSORS,
    "features": TENSORS,
    "explainer": TENSORS,
    "world": TENSORS,
    "models": TENSORS,
    "errors": TENSORS,
    "records": TABLES,
    "artifacts": TABLES,
    "storage": TABLES,
    "endpoints": TABLES,
    "config": TABLES,
    "stages": TABLES,
    "ground_truth": TABLES,
    "questions": TABLES,
    "evaluation": TABLES,
    "report": TABLES,
    "distributed": CLUSTER,
    "ask": JOBS,
    "launch": JOBS,
    "jobs": JOBS,
}
# Libraries that belong to one layer and those above it.
LOWEST = {"pyarrow": TABLES, "ray": CLUSTER, "deepspeed": CLUSTER}
MODULES = sorted([*ROOT.glob("ray_explain/**/*.py"), *ROOT.glob("jobs/*.py")])


def layer_of(path: Path) -> int:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return LAYERS["jobs"] if parts[0] == "jobs" else LAYERS[parts[1]]


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", [m for m in MODULES if m != ROOT / "ray_explain/__init__.py"], ids=str)
def test_a_module_imports_its_own_layer_or_a_lower_one(path: Path) -> None:
    for name in imports_of(path):
        package, *rest = name.split(".")
        if package == "ray_explain" and rest:
            assert LAYERS[rest[0]] <= layer_of(path), f"imports {name} from a layer above"
        elif package in LOWEST:
            assert LOWEST[package] <= layer_of(path), f"imports {package}, which belongs to a layer above"


def test_every_module_has_a_layer() -> None:
    assert {m.relative_to(ROOT).with_suffix("").parts[1] for m in MODULES if m.parts[-2] != "jobs"} - {
        "__init__"
    } <= set(LAYERS)
