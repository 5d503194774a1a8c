"""The house: imports point down, and importing is light."""

from __future__ import annotations

import ast
import compileall
import subprocess
import sys
from pathlib import Path

import torchpool

ROOT = Path(torchpool.__file__).parent
FLOORS = [
    {"windows", "reductions", "forced"},
    {"small"},
    {"kernels"},
    {"unpool", "ragged"},
    {"ops"},
    {"functional"},
    {"nn", "segments"},
    {"convert", "streaming"},
    {"analysis", "gallery"},
    {"plot", "interruption"},
    {"study", "bench"},
    {"cli"},
]
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}


def _imported(file: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        rooms |= {
            name.split(".")[1]
            for name in names
            if name.startswith("torchpool.") and name.count(".")
        }
    return rooms & FLOOR.keys()


def test_imports_point_down():
    for file in ROOT.rglob("*.py"):
        room = file.relative_to(ROOT).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for other in _imported(file) - {room}:
            assert FLOOR[other] < FLOOR[room], (
                f"{file.relative_to(ROOT)} imports {other}, which stands above it"
            )


def test_geometry_and_formulas_know_no_torch():
    for name in ("windows.py", "reductions.py"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not any(
            line.startswith(("import torch", "from torch ")) for line in text.splitlines()
        )


def test_importing_is_light():
    heavy = "{'numba', 'triton', 'matplotlib', 'optuna', 'typer', 'rich', 'sklearn', 'jinja2'}"
    code = (
        "import time, sys, torch; t = time.perf_counter(); import torchpool; "
        f"print(time.perf_counter() - t); print(sorted({heavy} & set(sys.modules)))"
    )
    before = "import torch, sys; print(sorted({'triton'} & set(sys.modules)))"
    compileall.compile_dir(ROOT, quiet=1)  # as pip leaves it
    times = []
    for _ in range(3):
        out = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        times.append(float(out[0]))
    already = subprocess.run(
        [sys.executable, "-c", before], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert out[1] == already
    assert min(times) < 0.3
