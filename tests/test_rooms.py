"""The rooms of the package: each imports only from those below it, and what is optional has one place."""

import ast
import subprocess
import sys
from pathlib import Path

import mobilemamba

PACKAGE = Path(mobilemamba.__file__).parent

#: From the top down. A room imports from those after it.
ROOMS = ("cli", "deploy", "training", "downstream", "timm", "hub", "zoo", "weights", "data", "models", "ops", "_native")
BESIDE = {("deploy", "training")}  # neigbours, which know nothing of each other


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """The rooms that the module at ``path`` imports from, by its own import statements."""
    package = path.relative_to(PACKAGE).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            where = package[: len(package) - node.level + 1] + tuple((node.module or "").split("."))
            where = tuple(part for part in where if part)
            found |= {where[0]} if where else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(name.split(".")[0] == "mobilemamba" for name in names), f"{path}: expected relative imports"
    return found & set(ROOMS)


def test_rooms_import_downwards() -> None:
    modules = [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or room_of(path) in ROOMS]
    assert {room_of(path) for path in modules} == set(ROOMS)
    edges = {(room_of(path), other) for path in modules for other in imported_rooms(path)}
    assert ("cli", "training") in edges
    assert ("zoo", "weights") in edges
    for room, other in sorted(edges):
        assert ROOMS.index(room) <= ROOMS.index(other), f"{room} imports from {other}, which is above it"
        assert tuple(sorted((room, other))) not in BESIDE


def test_every_module_says_what_it_is_for() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


#: What the import must not cost: optional packages, and parts of the standard library that only a download needs.
NOT_IMPORTED = {
    *(
        "PIL",
        "ai_edge_litert",
        "coremltools",
        "executorch",
        "litert_torch",
        "matplotlib",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "safetensors",
        "sklearn",
        "timm",
        "torchvision",
    ),
    *("huggingface_hub", "transformers", "mobilemamba.timm", "mobilemamba.hub"),
    *("html", "http.cookiejar"),
}


def test_import_brings_nothing_that_is_optional(tmp_path: Path) -> None:
    code = "import sys, torch; before = set(sys.modules); import mobilemamba; print(*set(sys.modules) - before)"
    command = [sys.executable, "-c", f"{code}; assert mobilemamba.export is mobilemamba.deploy.export"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.split())
    assert "mobilemamba.weights.table" in imported
    assert imported & NOT_IMPORTED == set()
    assert callable(mobilemamba.export)
