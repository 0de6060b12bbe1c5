"""Training state in, a folder that any number of workers can go on from out; a torn one is told apart.

state.safetensors         network, averaged and best weights, AdamW's moments
state-00001-of-00004.*    where tensors are sharded: the pieces of each worker, and their sha256, written by it
state.json                position in the plan, best validation, history; sha256 of the tensors and of itself

A folder counts when state.json is there, written after the first worker's tensors, and all parts that it asks for.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from elasticrec.artifact.location import sync_path
from elasticrec.errors import CheckpointError
from elasticrec.model.network import Network
from elasticrec.training.pieces import Piece, Reader, Snapshot, write

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

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
    sent_bytes: int = 0  # by one worker since the run began


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Which of the files of a checkpoint a worker writes. `mark` is the same on all, and another one at each save."""

    rank: int = 0
    parts: int = 1
    mark: str = ""

    @property
    def tensors(self) -> str:
        return f"{self._name}.safetensors"

    @property
    def state(self) -> str:
        """What is written last."""
        return STATE if self.rank == 0 else f"{self._name}.json"

    @property
    def _name(self) -> str:
        return "state" if self.parts == 1 else f"state-{self.rank + 1:05d}-of-{self.parts:05d}"


def save(folder: Path, tensors: Mapping[str, Tensor], position: Position) -> None:
    """Writes what one process holds."""
    snapshot = Snapshot()
    snapshot.take(tensors, rank=0)
    save_part(folder, snapshot.pieces, position, Part())


def save_part(folder: Path, pieces: Mapping[str, Piece], position: Position, part: Part) -> None:
    """Writes tensors first and the description last, so that a kill in between leaves no valid checkpoint.

    Once it returns, all of it is on the disk: the checkpoint before may go, and a machine may lose its power.

    Raises:
        CheckpointError: a tensor holds NaN or infinity; nothing is written.
    """
    for name, piece in pieces.items():
        if piece.tensor.is_floating_point() and not piece.tensor.sum().isfinite():
            raise CheckpointError(f"'{name}' holds NaN or infinity at step {position.step}, so it is not kept")
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / part.tensors, pieces)
    sync_path(folder / part.tensors)
    state = {"parts": part.parts, "mark": part.mark, "sha256": _sha256(folder / part.tensors)}
    if part.rank == 0:
        state |= asdict(position)
    partial = folder / f".{part.state}.partial"
    partial.write_text(json.dumps(state | {"state_sha256": _state_sha256(state)}), encoding="utf-8")
    sync_path(partial)
    partial.rename(folder / part.state)
    sync_path(folder)


def read_position(folder: Path) -> Position:
    """Checks a checkpoint whole and says where it stands.

    Raises:
        CheckpointError: naming the file that is missing, torn or corrupt.
    """
    state = _read_state(folder, Part())
    for rank in range(1, state["parts"]):
        part = Part(rank=rank, parts=state["parts"])
        if _read_state(folder, part)["mark"] != state["mark"]:
            raise CheckpointError(f"checkpoint '{folder}' is torn: '{part.tensors}' is of another attempt")
    return Position(
        step=state["step"],
        digest=state["digest"],
        best=state["best"],
        running=(state["running"][0], state["running"][1]),
        history=tuple(state["history"]),
        sent_bytes=state["sent_bytes"],
    )


def _read_state(folder: Path, part: Part) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((folder / part.state).read_text(encoding="utf-8"))
        if not isinstance(state, dict) or state.pop("state_sha256", None) != _state_sha256(state):
            raise CheckpointError(
                f"checkpoint file '{folder / part.state}' is corrupt: its sha256 is not the recorded one"
            )
        file = folder / Part(rank=part.rank, parts=state["parts"]).tensors
        digest = _sha256(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint '{folder}' is torn: {error}") from None
    if digest != state["sha256"]:
        raise CheckpointError(f"checkpoint file '{file}' is corrupt: its sha256 is not the recorded one")
    return state


def read_tensors(folder: Path, sharded: "Mapping[str, DTensor] | None" = None, prefix: str = "") -> dict[str, Tensor]:
    """All tensors, on the CPU; of what is `sharded` now this worker's part.

    Args:
        sharded: parameters by their name, which stand for what belongs to them too, or other tensors by their full one.
        prefix: of names; others are not read.
    """
    parts = int(json.loads((folder / STATE).read_text(encoding="utf-8"))["parts"])
    reader = Reader([folder / Part(rank=rank, parts=parts).tensors for rank in range(parts)])
    tensors: dict[str, Tensor] = {}
    for name, shape in reader.shapes.items():
        if not name.startswith(prefix):
            continue
        target = _target(name, sharded or {})
        split = target is not None and tuple(target.shape) == shape
        tensors[name] = reader.like(name, target) if split and target is not None else reader.whole(name)
    return tensors


def _target(name: str, sharded: "Mapping[str, DTensor]") -> "DTensor | None":
    """The tensor itself, or the parameter that `averaged.NAME` or `optimizer.NAME.exp_avg` belongs to."""
    _, _, parameter = name.partition(".")
    return sharded.get(name, sharded.get(parameter, sharded.get(parameter.rpartition(".")[0])))


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


def newest_whole(folders: Iterable[Path]) -> Path | None:
    """The first of `folders` (newest first) that can be read, whatever it belongs to."""
    for folder in folders:
        with contextlib.suppress(CheckpointError):
            read_position(folder)
            return folder
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
        if not parameter.requires_grad:
            continue
        # AdamW keeps its step count on the CPU unless it is fused on a GPU; moments lie with the parameter.
        optimizer.state[parameter] = {
            key: value.to(parameter.device) for key, value in section(tensors, name).items() if "." not in key
        }


def _state_sha256(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
