"""Every snippet and every command of README and docs is run; links and pictures are there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import eager_blocks as eager
import pytest
import torch
from torch import nn

from seaattn_kernels import SeaAttention, verify

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Their first line also says what a snippet needs: ```python gpu, ```python ultralytics.
FENCE = re.compile(r"^```(?P<language>\w*) ?(?P<needs>\w*)\n(?P<text>.*?)^```$", re.M | re.S)

#: What makes a command that takes minutes short.
_SHORT = {
    "python -m bench run": "--quick --no-chart --cases B1 --maps 8x8 --peers auto --seconds 0.05"
    " --out scratch",
    "python -m bench cpu": "--quick --no-chart --cases T1 --out cpu",
    "python -m bench train": "--steps 2 --no-chart --out train",
    "python tests/regression/error_budget.py": "--help",
    "pytest bench/micro": "--collect-only -q",
    "make": "--dry-run",
    "bash": "-n",
}
#: Run by other tests, which build and install: test_packaging.
_ELSEWHERE = ("pip install",)


class Block(NamedTuple):
    page: Path
    line: int
    needs: str
    text: str

    @property
    def code(self):
        return compile(self.text, f"{self.page.name}:{self.line}", "exec")


def blocks(page, language):
    text = page.read_text()
    return [
        Block(page, text.count("\n", 0, found.start()) + 2, found["needs"], found["text"])
        for found in FENCE.finditer(text)
        if found["language"] == language
    ]


def commands():
    """Each command once, without comments and what was typed with the line continued."""
    lines = [
        re.sub(r"(^|\s+)#.*", "", line)
        for page in PAGES
        for block in blocks(page, "sh")
        for line in block.text.splitlines()
    ]
    return [line for line in dict.fromkeys(lines) if line]


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (page.stem == "deploying")) for page in PAGES],
    ids=lambda page: page.stem,
)
def test_snippets(page, tmp_path, monkeypatch):
    """One after the other, in one namespace, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    model = verify.randomise(eager.Model(eager.Sea_Attention)).eval()
    names = {"model": model, "example": torch.randn(1, 3, 32, 32), "__name__": "snippets"}
    found = blocks(page, "python")
    for block in found:
        if block.needs == "gpu" and not torch.cuda.is_available():
            block.code  # noqa: B018
        elif block.needs in ("", "gpu"):
            exec(block.code, names)
    assert {block.needs for block in found} <= {"", "gpu", "ultralytics"}


@pytest.mark.slow
def test_snippets_for_ultralytics(stage, tmp_path):
    text = "".join(
        b.text for page in PAGES for b in blocks(page, "python") if b.needs == "ultralytics"
    )
    assert "register()" in text
    (tmp_path / "script.py").write_text(text)
    stage("script", tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where commands run: the files that they name, and nothing of the checkout."""
    where = tmp_path_factory.mktemp("commands")
    model = nn.Sequential(nn.Conv2d(3, 16, 1), SeaAttention(16))
    torch.save(model.state_dict(), where / "checkpoint.pt")
    torch.save({"model": model}, where / "old.pt")
    (where / "package").mkdir()
    (where / "package" / "models.py").write_text(
        "from seaattn_kernels.seaformer import seaformer\n"
        "def build(variant, classes):\n    return seaformer(variant, classes)\n"
    )
    results = next((ROOT / "bench" / "results").glob("**/cpu-float32-batch16.json"))
    for name in ("OLD", "NEW", "FILE", "before/a.json", "after/a.json"):
        (where / name).parent.mkdir(exist_ok=True)
        shutil.copy(results, where / name)
    for name in ("bench", "tests"):
        (where / name).symlink_to(ROOT / name)
    return where


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_commands(command, folder):
    if command.startswith(_ELSEWHERE):
        return
    more = next((more for start, more in _SHORT.items() if command.startswith(start)), "")
    words = command.split()
    if words[0] in ("make", "bash"):
        words.insert(1, more)
    else:
        words.append(more)
    line = " ".join(words).replace("python ", f"{sys.executable} ")
    line = re.sub(r"^pytest ", f"{sys.executable} -m pytest -p no:cacheprovider ", line)
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"}
    environment.pop("TRITON_INTERPRET", None)
    where = ROOT if words[0] == "make" else folder
    done = subprocess.run(
        line, shell=True, cwd=where, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{line}\n{(done.stdout + done.stderr)[-3000:]}"


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "docs" / "notes").glob("*.md"))],
                         ids=lambda page: page.stem)  # fmt: skip
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_picture_is_the_scripts(tmp_path):
    """Not compared by its bytes, which change with the fonts."""
    pytest.importorskip("matplotlib")
    target = tmp_path / "a.png"
    subprocess.run(
        [sys.executable, ROOT / "docs" / "how_it_works.py", target], check=True, timeout=120
    )
    sizes = []
    for path in (target, ROOT / "docs" / "how-it-works.png"):
        header = path.read_bytes()[:24]
        assert header.startswith(b"\x89PNG")
        sizes.append(header[16:24])
    assert sizes[0] == sizes[1]
