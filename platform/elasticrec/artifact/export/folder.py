"""A bundle and a format in, a folder with the model and what an answer needs besides out.

model.onnx | model.pt2   scores of all items for histories
items.json               item_id and title, a list each; the first one is item 1
edge.json                format, inputs, longest history, parity with the bundle, and which bundle it was; written last
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from elasticrec.artifact.bundle import Bundle
from elasticrec.artifact.export.formats import Format, format_of
from elasticrec.artifact.export.graph import ScoreGraph
from elasticrec.artifact.export.parity import Parity, compare, made_up
from elasticrec.artifact.location import locate, new_folder
from elasticrec.columns import ITEM, TITLE
from elasticrec.errors import ConfigError, ExportError
from elasticrec.model.history import History
from elasticrec.model.network import Network

ITEMS: Final = "items.json"
EDGE: Final = "edge.json"
CHECKED_USERS = 1_000
TOLERANCE = 1e-3
OTHERS: Final = 0.01  # of the users whose ten best may differ: scores that lie closer than rounding may change places


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """What was written."""

    folder: Path
    file: str
    bytes: int
    parity: Parity


def export_bundle(bundle: Bundle, kind: str, folder: str | Path, history: History | None = None) -> Export:
    """Writes the folder, after what is in it has given the bundle's scores.

    Args:
        history: users to compare on; made-up ones when not told.

    Raises:
        ConfigError: no such format.
        ExportError: the network cannot be exported, its file gives other scores, or the folder is there already.
    """
    made, place = format_of(kind), locate(folder)
    if not place.is_local:
        raise ExportError(f"'{place}' is not on a local disk; export to a folder here and copy it")
    network = bundle.network()
    fields = ScoreGraph(network).fields
    try:
        with new_folder(place) as draft:
            file = Path(draft.path) / made.file
            _write(made, network, file)
            parity = _checked(made, network, file, history)
            (draft / ITEMS).write(json.dumps(_items(bundle), ensure_ascii=False).encode())
            told = {"format": kind, "inputs": list(fields), "max_length": network.config.encoder.max_length}
            told |= {"n_items": network.n_items, "parity": asdict(parity), "bundle": _origin(bundle)}
            (draft / EDGE).write((json.dumps(told, indent=2) + "\n").encode())
            return Export(folder=Path(place.path), file=made.file, bytes=file.stat().st_size, parity=parity)
    except FileExistsError:
        raise ExportError(f"'{place}' is there already; give an export a folder of its own") from None


def _write(made: Format, network: Network, file: Path) -> None:
    try:
        made.write(ScoreGraph(network).eval(), network.config.encoder.max_length, file)
    except (ConfigError, ExportError):
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[:1]
        raise ExportError(
            f"the exporter cannot follow this network: {type(error).__name__}: {' '.join(first)}"
        ) from error


def _checked(made: Format, network: Network, file: Path, history: History | None) -> Parity:
    told = made_up(network, CHECKED_USERS) if history is None else history
    exported = made.open(file, ScoreGraph(network).fields)
    parity = compare(network, exported, told, any_batch=made.any_batch)
    if parity.largest > TOLERANCE:
        raise ExportError(
            f"the file's scores are off by up to {parity.largest:.2g} where {TOLERANCE:g} is allowed; "
            "export the bundle that this one was made from"
        )
    if parity.different > OTHERS * parity.users:
        raise ExportError(
            f"the ten best items of {parity.different} of {parity.users} users are others by the file; its scores lie "
            f"within {parity.largest:.2g} of the bundle's, whose own are closer together than that"
        )
    return parity


def _items(bundle: Bundle) -> dict[str, list[Any]]:
    table = bundle.items()
    ids = [str(item) for item in table.column(ITEM).to_pylist()]
    return {ITEM: ids, TITLE: table.column(TITLE).to_pylist()}


def _origin(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    files = {name: entry.sha256 for name, entry in manifest.files.items()}
    return {"name": manifest.name, "version": manifest.version, "recipe": dict(manifest.recipe), "files": files}
