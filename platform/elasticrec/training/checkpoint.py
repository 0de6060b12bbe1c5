"""Training state in, a folder that any number of workers can go on from out; a torn one is told apart.

state.safetensors   network, averaged and best weights, AdamW's moments
state.json          position in the plan, best validation, history; sha256 of the tensors and of itself; written last
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from elasticrec.errors import CheckpointError
from elasticrec.model.network import Network

TENSORS = "state.safetensors"
STATE = "state.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Where a run stands: everything of it that is no tensor."""

    step: int
    digest: str  # of the plan and its data
    best: dict[str, float] = field(default_factory=dict)  # value, epoch, stale
    running: tuple[float, float] = (0.0, 0.0)  # summed loss and tokens of the epoch so far
    history: tuple[dict[str, float], ...] = ()


def save(folder: Path, tensors: dict[str, Tensor], position: Position) -> None:
    """Writes tensors first and the description last, so that a kill in between leaves no valid checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
    state = {
        "step": position.step,
        "digest": position.digest,
        "best": position.best,
        "running": list(position.running),
        "history": list(position.history),
        "sha256": _sha256(folder / TENSORS),
    }
    partial = folder / f".{STATE}.partial"
    partial.write_text(json.dumps(state | {"state_sha256": _state_sha256(state)}), encoding="utf-8")
    partial.rename(folder / STATE)


def read_position(folder: Path) -> Position:
    """Checks a checkpoint whole and says where it stands.

    Raises:
        CheckpointError: naming the file that is missing, torn or corrupt.
    """
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
        digest = _sha256(folder / TENSORS)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint '{folder}' is torn: {error}") from None
    if not isinstance(state, dict) or state.pop("state_sha256", None) != _state_sha256(state):
        raise CheckpointError(f"checkpoint file '{folder / STATE}' is corrupt: its sha256 is not the recorded one")
    if digest != state["sha256"]:
        raise CheckpointError(f"checkpoint file '{folder / TENSORS}' is corrupt: its sha256 is not the recorded one")
    return Position(
        step=state["step"],
        digest=state["digest"],
        best=state["best"],
        running=(state["running"][0], state["running"][1]),
        history=tuple(state["history"]),
    )


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors, on the CPU."""
    return load_file(folder / TENSORS)


def newest_valid(folders: Iterable[Path], digest: str) -> Path | None:
    """The first of `folders` (newest first) that is whole; None when there are none at all.

    Raises:
        CheckpointError: the checkpoint belongs to another plan or data set, or every one is damaged.
    """
    problems = []
    for folder in folders:
        try:
            position = read_position(folder)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if position.digest != digest:
            raise CheckpointError(
                f"checkpoint '{folder}' was made with another plan or data set "
                f"({position.digest}, this run is {digest}); give the run another name"
            )
        return folder
    if problems:
        raise CheckpointError("no checkpoint is whole: " + "; ".join(problems) + "; give the run another name")
    return None


def flatten(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Puts `prefix.` before every name."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def section(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The inverse of `flatten` for one prefix."""
    return {
        name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")
    }


def optimizer_tensors(optimizer: torch.optim.Optimizer, network: Network) -> dict[str, Tensor]:
    """AdamW's state by parameter name, so that it does not depend on the order of groups."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in network.named_parameters()}
    return {
        f"{names[parameter]}.{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, network: Network, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    for name, parameter in network.named_parameters():
        # AdamW keeps its step count on the CPU unless it is fused on a GPU; moments lie with the parameter.
        optimizer.state[parameter] = {
            key: value.to(parameter.device) for key, value in section(tensors, name).items() if "." not in key
        }


def _state_sha256(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
