"""Pages of the documentation in; what each of their blocks did, one line of JSON a command, out.

    python -m tests.e2e.docs_session FOLDER        in an environment whose Ray is a private cluster of the test

Blocks without a title are run, in order, in one folder for all pages. `bash` runs line by line, `python` as one
program, `yaml` and `json` are read. A title says where else a block belongs: in FILE.py or FILE.yaml, which is then
written, in a terminal of its own, which is then opened, or out of reach, and then each command is understood and not
run. What is neither run nor understood is a failure. A command that an earlier page has run, word for word, is not
run again.
"""

import ast
import contextlib
import dataclasses
import importlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import yaml

from elasticrec.cli.local_cluster import free_port
from elasticrec.cli.main import run
from elasticrec.cli.web import get
from elasticrec.compression.space import SweepConfig
from elasticrec.config import from_mapping
from elasticrec.training.run import RunConfig
from tests.arch.commands import parsed
from tests.arch.fences import ELSEWHERE, OPEN, PAGES, ROOT, Fence, check_command, fences

DEADLINE_S = 90.0
ASKED = ("ray status", "ray list nodes", "ray job list", "serve status")  # of a cluster, which this session has
PROGRAMS = {"ray": [sys.executable, "-m", "ray.scripts.scripts"], "serve": [sys.executable, "-m", "ray.serve.scripts"]}


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one command of a page did."""

    page: str
    command: str
    seconds: float
    error: str = ""


class Session:
    """One folder, one environment and one service for all pages."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.names = folder, {}
        self._port = free_port()
        self._service: subprocess.Popen[bytes] | None = None
        self._done: set[str] = set()

    def block(self, fence: Fence) -> Iterator[tuple[str, str]]:
        """(command, error or nothing) for each command of a block."""
        if fence.language in ("bash", "sh"):
            for command in fence.commands():
                yield command, self._guarded(self._command, fence, command)
        else:
            yield f"{fence.language} block at line {fence.line}", self._guarded(self._text, fence, fence.text)

    def close(self) -> None:
        if self._service is not None:
            self._service.terminate()
            self._service.wait(timeout=30)

    def _guarded(self, act: object, fence: Fence, text: str) -> str:
        try:
            act(fence, text)  # type: ignore[operator]
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a block raises is what it did
            return f"{error!r}\n{traceback.format_exc(limit=-3)}"
        return ""

    def _command(self, fence: Fence, command: str) -> None:
        if command in ASKED:
            self._child([*PROGRAMS[command.split(maxsplit=1)[0]], *command.split()[1:]])
        elif fence.title in ELSEWHERE:
            check_command(command, self.folder)
            self._stand_in(command)
        elif command not in self._done:
            self._run(shlex.split(os.path.expandvars(command)), opens=fence.title == OPEN)
            self._done.add(command)

    def _stand_in(self, command: str) -> None:
        """Half a minute of `elasticrec compress`, which test_quickstart and test_ways run, leaves a bundle."""
        words = shlex.split(command)
        if words[:2] == ["elasticrec", "compress"] and not Path(words[words.index("--out") + 1]).exists():
            shutil.copytree(words[2], words[words.index("--out") + 1])

    def _text(self, fence: Fence, text: str) -> None:
        if fence.title.endswith((".py", ".yaml")):
            (self.folder / fence.title).write_text(text, encoding="utf-8")
        if fence.language == "yaml":
            check_settings(text)
        elif fence.language == "json":
            json.loads(text)
        elif fence.title in ELSEWHERE:
            check_imports(text)
        elif fence.title:
            importlib.import_module(fence.title.removesuffix(".py"))
        else:
            exec(compile(text, f"{fence.page}:{fence.line}", "exec"), self.names)

    def _run(self, words: list[str], opens: bool) -> None:
        program, rest = words[0], words[1:]
        if program == "elasticrec" and opens:
            self._serve(rest)
        elif program == "elasticrec":
            told = io.StringIO()
            with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
                status = run(shortened(rest))
            assert status == 0, told.getvalue()[-2_000:]
        elif program == "export":
            os.environ.update(word.split("=", 1) for word in rest)
        elif program == "curl":
            self._ask([word.replace("localhost:8000", f"127.0.0.1:{self._port}") for word in rest])
        elif program == "python" and (ROOT / rest[0]).is_file():
            self._child([sys.executable, str(ROOT / rest[0]), *rest[1:]])
        else:
            check_command(shlex.join(words), self.folder)

    def _ask(self, words: list[str]) -> None:
        answer = self._child(["curl", "--fail-with-body", "--noproxy", "*", *words])
        json.loads(answer)

    def _child(self, words: Sequence[str]) -> str:
        done = subprocess.run(words, cwd=self.folder, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout[-1_000:] + done.stderr[-1_000:]
        return done.stdout

    def _serve(self, rest: list[str]) -> None:
        """`elasticrec serve run` goes on beside what follows, on a free port."""
        if self._service is not None:
            parsed(rest)
            return
        command = [sys.executable, "-m", "elasticrec.cli", *rest, "--port", str(self._port)]
        with (self.folder / "service.log").open("wb") as log:
            env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
            self._service = subprocess.Popen(command, cwd=self.folder, env=env, stdout=log, stderr=log)
        deadline_s = time.monotonic() + DEADLINE_S
        while not self._ready():
            assert self._service.poll() is None, (self.folder / "service.log").read_text()[-2_000:]
            assert time.monotonic() < deadline_s, "the service is not ready"
            time.sleep(0.2)

    def _ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return get(f"http://127.0.0.1:{self._port}/readyz").status_code == 200
        return False


def shortened(words: list[str]) -> list[str]:
    """Ten epochs in place of the hundred of the defaults: no page says how good its little model gets."""
    by_default = words[0] == "train" and not {"--epochs", "--config"} & {*words}
    return [*words, "--epochs", "10"] if by_default else words


def check_settings(text: str) -> None:
    """All YAML of the pages are settings of a run or of a sweep, or some of their keys."""
    raw = yaml.safe_load(text)
    for config_type in (RunConfig, SweepConfig):
        if set(raw) <= {field.name for field in dataclasses.fields(config_type)}:
            from_mapping(config_type, raw)
            return
    raise ValueError(f"neither settings of a run nor of a sweep: {sorted(raw)}")


def check_imports(text: str) -> None:
    """A piece of a program must parse, and what it imports must be there."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{node.module} has no {missing}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    os.chdir(folder)
    os.environ["PWD"] = str(folder)
    sys.path.insert(0, str(folder))
    session = Session(folder)
    session.names |= _names_of_pages(folder)
    try:
        for page in PAGES:
            for fence in fences(ROOT / page):
                started_s = time.perf_counter()
                for command, error in session.block(fence):
                    took_s = time.perf_counter() - started_s
                    line = {"page": page, "command": command, "seconds": round(took_s, 2), "error": error}
                    print(json.dumps(line), flush=True)
                    started_s = time.perf_counter()
    finally:
        session.close()


def _names_of_pages(folder: Path) -> dict[str, object]:
    """What a Python block of a page may take for given: a network and its store."""
    from elasticrec.data.sequences import open_store
    from elasticrec.model.encoder import EncoderConfig
    from elasticrec.model.network import Network, NetworkConfig

    store = open_store(folder / "store")
    network = Network(NetworkConfig(encoder=EncoderConfig(width=8, blocks=1, max_length=4)), store.n_items)
    return {"store": store, "network": network}


if __name__ == "__main__":
    main()
