"""A cache folder in, an interpreter that has the peers out."""

import hashlib
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CONSTRAINTS = HERE.parents[1] / "constraints.txt"


def peers_python(cache: Path, requirements: str = "requirements.txt") -> str:
    """The interpreter of a virtual environment under `cache` that holds `requirements`; made on first use.

    Only torch's version is taken from constraints.txt: the peers' other pins conflict with this project's.
    """
    torch = next(line for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines() if line.startswith("torch=="))
    wanted = (HERE / requirements).read_text(encoding="utf-8") + torch
    folder = cache / f"peers-{hashlib.sha256(wanted.encode()).hexdigest()[:8]}"
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        print(f"making the peers' environment in '{folder}'", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--requirement", str(HERE / requirements)]
        subprocess.run([*install, torch], check=True)
        ready.touch()
    return str(python)
