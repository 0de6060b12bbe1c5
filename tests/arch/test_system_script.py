"""deploy/system.sh finds a Python, installs what is missing where it may, and otherwise names the command to run."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "system.sh"
OLD_PYTHON = '#!/bin/sh\ncase "$1" in --version) echo "Python 3.9.2" ;; *) exit 1 ;; esac\n'
NO_VENV_PYTHON = '#!/bin/sh\ncase "$2" in *venv*) exit 1 ;; *print*) echo 3.12 ;; esac\n'
ROOT, USER = "#!/bin/sh\necho 0\n", "#!/bin/sh\necho 1000\n"

Runner = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def system(tmp_path: Path) -> Runner:
    """Runs the script on a machine that has only the programs given, by name and script."""

    def run(argument: str, **programs: str) -> subprocess.CompletedProcess[str]:
        for name, script in programs.items():
            path = tmp_path / name.replace("_", "-")
            path.write_text(script, encoding="utf-8")
            path.chmod(0o755)
        (tmp_path / "env").symlink_to("/usr/bin/env")
        env = {"PATH": str(tmp_path), "BIN": str(tmp_path)}
        command = ["/bin/sh", str(SCRIPT), argument]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=30)

    return run


def python_at(path: str) -> str:
    return f'#!/bin/sh\necho "$@" >> "$BIN/asked"\n/bin/ln -s {sys.executable} "$BIN/{path}"\n'


def test_the_first_python_that_is_new_enough_is_printed_alone(system: Runner, tmp_path: Path) -> None:
    done = system("setup", python3=OLD_PYTHON, **{"python3.11": f'#!/bin/sh\nexec {sys.executable} "$@"\n'})
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/python3.11\n"


def test_root_gets_a_missing_python_installed(system: Runner, tmp_path: Path) -> None:
    done = system("setup", python3=OLD_PYTHON, id=ROOT, apt_get=python_at("python3.13"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/python3.13\n"
    assert (tmp_path / "asked").read_text(encoding="utf-8") == "install -y --no-install-recommends python3.13\n"
    assert "found Python 3.9.2" in done.stderr


def test_a_user_without_root_gets_the_command(system: Runner) -> None:
    done = system("setup", python3=NO_VENV_PYTHON, id=USER, apt_get="#!/bin/sh\nexit 9\n")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "the venv module of Python 3.12 is missing and installing it needs root" in done.stderr
    assert "sudo apt-get install -y --no-install-recommends python3.12-venv" in done.stderr


def test_a_failed_installation_and_an_unknown_manager_fail(system: Runner, tmp_path: Path) -> None:
    assert "no known package manager" in system("test").stderr
    (tmp_path / "env").unlink()
    done = system("test", id=ROOT, apt_get="#!/bin/sh\nexit 9\n")
    assert done.returncode == 1
    assert "'git' could not be installed" in done.stderr


def test_an_unknown_argument_is_refused(system: Runner) -> None:
    done = system("everything")
    assert done.returncode == 2
    assert "usage" in done.stderr
