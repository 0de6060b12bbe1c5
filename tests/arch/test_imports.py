"""The import contracts hold, and they bite: each breaks when a forbidden import is put into a copy of the sources."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("platform", "jobs", "serve_apps")
LAYERS, SERVING, NO_RAY = (
    "The flow, high to low",
    "Serving imports neither training nor compression",
    "The model knows nothing of Ray",
)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in SOURCES:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def broken_contracts(folder: Path) -> set[str]:
    env = os.environ | {"PYTHONPATH": f"{folder / 'platform'}{os.pathsep}{folder}"}
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as m; m()", "--no-cache"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=120)
    verdicts = re.findall(r"^(.+?) (KEPT|BROKEN)\b", done.stdout, re.MULTILINE)
    assert len(verdicts) == 3, done.stdout + done.stderr
    assert done.returncode == int(any(verdict == "BROKEN" for _, verdict in verdicts))
    return {name for name, verdict in verdicts if verdict == "BROKEN"}


def test_contracts_hold(copy: Path) -> None:
    assert broken_contracts(copy) == set()


@pytest.mark.parametrize(
    ("module", "statement", "broken"),
    [
        ("data/intruder.py", "import elasticrec.model.network", {LAYERS}),
        ("training/intruder.py", "from elasticrec.serving import api", {LAYERS}),
        ("artifact/intruder.py", "import jobs", {LAYERS}),
        ("serving/intruder.py", "import elasticrec.training", {LAYERS, SERVING}),
        ("serving/intruder.py", "import elasticrec.compression.pareto", {LAYERS, SERVING}),
        ("model/intruder.py", "def f() -> None:\n    import ray", {NO_RAY}),
        ("artifact/intruder.py", "from ray import train", {NO_RAY}),
    ],
)
def test_contract_breaks_on_a_forbidden_import(copy: Path, module: str, statement: str, broken: set[str]) -> None:
    (copy / "platform" / "elasticrec" / module).write_text(f'"""An intruder."""\n\n{statement}\n', encoding="utf-8")
    assert broken_contracts(copy) == broken


def test_platform_never_becomes_a_package() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists(), "it would shadow the standard library's platform module"
    done = subprocess.run(
        [sys.executable, "-c", "import platform, elasticrec; print(platform.python_version())"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == ".".join(map(str, sys.version_info[:3]))
