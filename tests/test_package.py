"""Importing has no effects, and imports run downward."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "seaattn_kernels"
#: What each file may import of the package. Who is not listed imports nothing of it.
DOWNWARD = {
    "__init__": {"graphs", "ops", "module", "patch"},
    "graphs": {"checks"},
    "ultralytics": {"module"},
    "__main__": {"", "locate", "migrate", "native", "ops", "patch", "verify"},
    "locate": {"seaformer"},
    "migrate": {"anatomy", "layers", "module", "probe"},
    "verify": {"budget", "fold", "ops", "reference", "seaformer", "module"},
    "seaformer": {"layers", "module"},
    "patch": {"anatomy", "checks", "fold", "module", "ops", "probe", "report"},
    "probe": {"anatomy", "budget", "fold", "module"},
    "module": {"anatomy", "checks", "ops", "fold", "layers", "reference", "training"},
    "training": {"anatomy", "checks", "normalized", "norms", "ops", "reference"},
    "fold": {"anatomy", "native", "reference", "watch"},
    "watch": {"anatomy", "native"},
    "anatomy": {"layers"},
    "report": {"budget"},
    "ops": {"checks", "crossover", "native", "overloads", "reference"},
    "overloads": {"kernels", "native", "normalized", "reference"},
    "normalized": {"reference"},
    "checks": {"reference"},
}


def _imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_imports_run_downward(path):
    modules = {p.stem for p in PACKAGE.rglob("*.py")} | {"kernels"}
    own = {
        name.split(".")[1] if "." in name else ""
        for name in _imports(path)
        if name.split(".")[0] == "seaattn_kernels"
    }
    own = {name for name in own if name in modules or (name == "" and path.stem == "__main__")}
    assert own <= ({"kernels"} if "kernels" in path.parts else DOWNWARD.get(path.stem, set()))


def test_every_folder_is_packaged():
    declared = (PACKAGE.parent / "pyproject.toml").read_text()
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        name = ".".join(folder.relative_to(PACKAGE.parent).parts)
        assert f'"{name}"' in declared


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_each_foreign_library_has_one_door(path):
    source = path.read_text()
    imported = {name.split(".")[0] for name in _imports(path)}
    if "kernels" not in path.parts[:-1]:
        assert "triton" not in imported
    if path.stem != "overloads":
        assert "torch.library" not in source
    if path.stem != "native":
        assert "load_library" not in source
    if path.stem != "__main__":
        assert not imported & {"matplotlib", "bench", "tqdm"}


def test_the_direction_test_sees_a_wrong_import(tmp_path):
    path = tmp_path / "reference.py"
    path.write_text("def f():\n    from seaattn_kernels.ops import gate\n")
    assert "seaattn_kernels.ops" in _imports(path)


def test_import_is_silent_and_touches_nothing():
    code = (
        "import sys, torch\n"
        "state = torch.random.get_rng_state()\n"
        "import seaattn_kernels\n"
        "from seaattn_kernels import seaformer, fold, verify\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert torch.equal(state, torch.random.get_rng_state())\n"
        "wrong = {'triton', 'matplotlib', 'bench', 'torch._inductor'} & set(sys.modules)\n"
        "assert not wrong, wrong\n"
        "assert not [m for m in sys.modules if m.startswith('torch.utils.cpp_extension')]\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""


def test_works_in_a_forked_child():
    code = (
        "import os, torch, seaattn_kernels\n"
        "block = seaattn_kernels.SeaAttention(8).eval()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    with torch.no_grad():\n"
        "        os._exit(0 if block(torch.ones(1, 8, 5, 5)).isfinite().all() else 1)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent, timeout=120)
