"""`elasticrec GROUP COMMAND …`: finds the command, parses its options from its signature, shows errors in one line."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tyro
from rich.console import Console

from elasticrec import __version__
from elasticrec.errors import ElasticRecError, suggestion


@dataclass(frozen=True, slots=True)
class Command:
    """Where a command is implemented; imported only when it is called, since torch and ray take seconds."""

    target: str
    summary: str


Tree = Mapping[str, "Command | Tree"]

COMMANDS: Tree = {
    "quickstart": Command("quickstart:quickstart", "the whole road once on MovieLens-100K"),
    "data": {
        "list": Command("data:list_datasets", "data sets of the catalogue"),
        "fetch": Command("data:fetch_dataset", "download a data set of the catalogue"),
        "prepare": Command("data:prepare_data", "your own logs, or a data set by name, into a training store"),
        "synthesize": Command("data:synthesize", "make up a log of any size, with real structure"),
        "check": Command("data:check_store", "compare a store's files with their checksums"),
    },
    "recipe": Command("train:write_recipe", "settings for a store of its size, as a config file"),
    "train": Command("train:train", "train with Ray Train on elastic workers"),
    "evaluate": Command("evaluate:evaluate_bundle", "rank the whole catalogue with a bundle, beside the baselines"),
    "compress": Command("compress:compress_bundle", "sweep smaller versions with Ray Tune and choose one"),
    "bundle": {
        "show": Command("bundle:show", "what is in a bundle"),
        "verify": Command("bundle:verify", "check every file of a bundle"),
        "export": Command("bundle:export", "write a bundle for ONNX Runtime, torch alone or ExecuTorch"),
    },
    "registry": {
        "publish": Command("registry:publish", "copy a bundle into the registry as the next version"),
        "promote": Command("registry:promote", "point a label, and the service, at a version"),
        "canary": Command("registry:canary", "answer a share of the users by another version"),
        "shadow": Command("registry:shadow", "compare another version's answers without returning them"),
        "rollback": Command("registry:rollback", "point a label, and the service, at the version before"),
        "list": Command("registry:list_versions", "models, versions and labels"),
    },
    "recommend": Command("recommend:recommend", "recommendations of a bundle, without a service"),
    "recommend-batch": Command("recommend_batch:recommend_batch", "top-k of every user to parquet, through Ray Data"),
    "serve": {
        "run": Command("serve:run", "serve a bundle from this machine until Ctrl-C"),
        "key": Command("serve:key", "make an API key"),
        "revoke": Command("serve:revoke", "take an API key back"),
    },
    "monitor": Command("monitor:monitor", "Prometheus and Grafana beside a running cluster until Ctrl-C"),
}

_ADVICE: Mapping[type[OSError], str] = {
    PermissionError: "give a place where you may read and write",
    FileNotFoundError: "check the path, and make its folder first",
    FileExistsError: "give another path",
    NotADirectoryError: "a part of the path is a file; give a path in a folder",
    IsADirectoryError: "give a file, not a folder",
}


def main() -> None:
    """Entry point of the `elasticrec` script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs one command line. Returns the exit status: 0, or 2 with one clear message for a mistake of the user."""
    if list(arguments) == ["--version"]:
        print(f"elasticrec {__version__}")
        return 0
    try:
        command, words, rest = _find(arguments)
        if command is None:
            return 0
        _load(command)(" ".join(["elasticrec", *words]), rest)
    except ElasticRecError as error:
        return _mistake(str(error))
    except OSError as error:
        return _mistake(explain(error))
    except KeyboardInterrupt:
        return 130
    return 0


def explain(error: OSError) -> str:
    """What the system refused, where, and what to do about it."""
    what = f"'{error.filename}': {error.strerror}" if error.filename and error.strerror else str(error)
    advice = next((text for kind, text in _ADVICE.items() if isinstance(error, kind)), None)
    if advice is None and error.filename:
        advice = "check the path and the disk that it is on"
    return "; ".join(filter(None, (what or type(error).__name__, advice)))


def _mistake(text: str) -> int:
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {text}", markup=False, style="red")
    return 2


def call(function: Callable[..., Any], prog: str, arguments: Sequence[str], **options: Any) -> Any:
    """Parses `arguments` by the signature of `function` and calls it."""
    return tyro.cli(function, prog=prog, args=list(arguments), config=(tyro.conf.OmitArgPrefixes,), **options)


def _find(arguments: Sequence[str]) -> tuple[Command | None, list[str], list[str]]:
    node: Command | Tree = COMMANDS
    words: list[str] = []
    rest = list(arguments)
    while not isinstance(node, Command):
        if not rest or rest[0] in ("-h", "--help"):
            _help(words, node)
            return None, words, rest
        word = rest.pop(0)
        if word not in node:
            known = suggestion(word, node)
            raise ElasticRecError(f"'{' '.join(['elasticrec', *words])}' has no command '{word}'{known}")
        words.append(word)
        node = node[word]
    return node, words, rest


def _load(command: Command) -> Callable[[str, Sequence[str]], Any]:
    module, name = command.target.split(":")
    function = getattr(importlib.import_module(f"elasticrec.cli.{module}"), name)
    if getattr(function, "takes_arguments", False):
        return function  # type: ignore[no-any-return]
    return lambda prog, rest: call(function, prog, rest)


def _help(words: Sequence[str], tree: Tree) -> None:
    print(f"usage: {' '.join(['elasticrec', *words])} COMMAND …   (--help after a command shows its options)\n")
    for name, node in tree.items():
        summary = node.summary if isinstance(node, Command) else " | ".join(node)
        print(f"  {name:<16} {summary}")
