"""A network and its catalogue in, one immutable folder out; and back, checked.

manifest.json         config, recipe, metrics, lineage, sha256 of each file; written last
weights.safetensors   the state of the network
items.parquet         item_index, item_id, title, categories, count
content.parquet       what gives new items a vector: weights of categories and words (only where it was fitted)
golden.json           answers to fixed questions, by which a replica checks itself (only once published)
encoder.onnx          the encoder as one graph, by which replicas on CPUs answer small batches (once published by the
                      command, of networks that have one)
"""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from elasticrec import __version__
from elasticrec.artifact.golden import Golden, parse_golden
from elasticrec.artifact.location import Location, locate, new_folder
from elasticrec.artifact.manifest import (
    CONTENT,
    ENCODER,
    GOLDEN,
    ITEMS,
    MANIFEST,
    WEIGHTS,
    FileEntry,
    Manifest,
    parse,
    render,
)
from elasticrec.columns import CATEGORIES, COUNT, ITEM, ITEM_INDEX, TITLE
from elasticrec.config import from_mapping, to_mapping
from elasticrec.data.sequences import Float32
from elasticrec.errors import BundleError, ConfigError
from elasticrec.model.content import ContentTower
from elasticrec.model.network import Network, NetworkConfig

_Content = bytes  # which is the name of a bundle's size, too
ITEM_COLUMNS = (ITEM_INDEX, ITEM, TITLE, CATEGORIES, COUNT)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """An opened bundle; nothing but its manifest is in memory."""

    location: Location
    manifest: Manifest
    manifest_bytes: int

    @property
    def uri(self) -> str:
        return self.location.uri

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def version(self) -> str:
        return self.manifest.version

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return self.manifest_bytes + sum(entry.bytes for entry in self.manifest.files.values())

    @property
    def weights_bytes(self) -> int:
        return self.manifest.files[WEIGHTS].bytes

    def network(self) -> Network:
        """The network on the CPU, in evaluation mode, without gradients.

        Raises:
            BundleError: config and weights do not fit each other, or a file cannot be read.
        """
        try:
            network = Network(from_mapping(NetworkConfig, self.manifest.config), self.manifest.n_items)
            network.load_state_dict(_read_weights(self.location / WEIGHTS))
        except (ConfigError, RuntimeError) as error:
            raise BundleError(f"'{self.uri}' holds no network this version can build: {error}") from None
        return network.eval().requires_grad_(False)

    def items(self) -> pa.Table:
        """item_index, item_id, title, categories (list of strings), count.

        Raises:
            BundleError: the file is missing or damaged.
        """
        return _read_table(self.location / ITEMS)

    def content(self) -> ContentTower | None:
        """What embeds items that the network has never seen; none where no tower was fitted.

        Raises:
            BundleError: the file is missing or damaged.
        """
        return ContentTower.of_table(_read_table(self.location / CONTENT)) if CONTENT in self.manifest.files else None

    def golden(self) -> list[Golden] | None:
        """Its answers to fixed questions; none before it was published.

        Raises:
            BundleError: the file is missing or damaged.
        """
        raw = self._read(GOLDEN)
        return None if raw is None else parse_golden(raw, str(self.location / GOLDEN))

    def encoder(self) -> _Content | None:
        """The graph of its encoder; none before the command published it, and of networks that have none.

        Raises:
            BundleError: the file is missing or damaged.
        """
        return self._read(ENCODER)

    def _read(self, file: str) -> _Content | None:
        if file not in self.manifest.files:
            return None
        place = self.location / file
        try:
            return place.read()
        except OSError as error:
            raise BundleError(f"'{place}' is missing or damaged: {error}; get the bundle again") from None

    def embed_new(self, items: pa.Table, vectors: Float32 | None = None) -> Tensor:
        """Vectors of new items in the space of the network's item table: float32 (items, width).

        Args:
            items: title and categories of each.
            vectors: (items, F), where the tower was fitted with vectors.

        Raises:
            BundleError: the bundle has no content tower, or a damaged one.
            InputError: vectors do not fit the tower.
        """
        tower = self.content()
        if tower is None:
            raise BundleError(
                f"'{self.uri}' has no {CONTENT}, so it cannot embed new items; train it with a content tower"
            )
        return tower.embed_new(items, vectors)


def write_bundle(  # noqa: PLR0913 - all but three are named and optional
    uri: str | Path | Location,
    network: Network,
    items: pa.Table,
    *,
    name: str,
    version: str,
    recipe: Mapping[str, Any] | str = "float32",
    metrics: Mapping[str, Any] | None = None,
    lineage: Mapping[str, Any] | None = None,
    content: ContentTower | None = None,
) -> Bundle:
    """Writes a bundle to a place where nothing is yet; nothing is left behind when that fails.

    Args:
        items: row i is item i + 1, with the columns of ITEM_COLUMNS.
        recipe: how the network was compressed; text is short for `{"kind": text}`.
        lineage: parent (uri of a bundle), dataset (a store's fingerprint), command; versions and commit are added.
        content: what embeds new items.

    Raises:
        BundleError: something is there already, the items do not fit the network, or weights are not finite.
    """
    _check_items(items, network.n_items)
    state = _finite_state(network)
    final = locate(uri)
    if (final / MANIFEST).exists():
        raise _exists(final)
    try:
        with new_folder(final) as folder:
            (folder / WEIGHTS).write(safetensors.torch.save(state))
            with (folder / ITEMS).writing() as stream:
                _write_small(items, stream)
            if content is not None:
                with (folder / CONTENT).writing() as stream:
                    pq.write_table(content.to_table(), stream)
            manifest = Manifest(
                name=name,
                version=version,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                n_items=network.n_items,
                config=to_mapping(network.config),
                recipe={"kind": recipe} if isinstance(recipe, str) else recipe,
                metrics=metrics or {},
                lineage=_lineage(lineage or {}),
                files={file: describe(folder / file) for file in (WEIGHTS, ITEMS, *([CONTENT] if content else []))},
            )
            (folder / MANIFEST).write(render(manifest))  # its presence makes the folder a bundle
    except FileExistsError:
        raise _exists(final) from None
    except OSError as error:
        raise BundleError(
            f"'{final}' cannot be written: {error}; check the path, its permissions and the space"
        ) from None
    return open_bundle(final, verify=False)


def open_bundle(uri: str | Path | Location, *, verify: bool = True) -> Bundle:
    """Opens a bundle; `verify` reads every file once and compares its sha256.

    Raises:
        BundleError: no bundle there, one of a newer schema, or (naming the file) a damaged, missing or extra one.
    """
    location = locate(uri)
    place = location / MANIFEST
    try:
        raw = place.read()
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"'{location}' is not a bundle: it has no {MANIFEST}; check the path") from None
    except OSError as error:
        raise BundleError(f"'{place}' cannot be read: {error}") from None
    bundle = Bundle(location=location, manifest=parse(raw, str(place)), manifest_bytes=len(raw))
    if verify:
        _check_files(bundle)
    return bundle


def verify_bundle(uri: str | Path | Location) -> None:
    """Raises BundleError that names the first file which is damaged, missing or not of the bundle."""
    open_bundle(uri, verify=True)


def describe(place: Location) -> FileEntry:
    return FileEntry(bytes=place.size_bytes(), sha256=place.sha256())


def _check_files(bundle: Bundle) -> None:
    expected = bundle.manifest.files
    for name in sorted(expected):
        place = bundle.location / name
        try:
            found = describe(place)
        except FileNotFoundError:
            raise BundleError(f"'{place}' is missing; get the bundle again") from None
        if found != expected[name]:
            raise BundleError(
                f"'{place}' is damaged: {found.bytes} bytes with sha256 {found.sha256[:12]}…, "
                f"expected {expected[name].bytes} with {expected[name].sha256[:12]}…; get the bundle again"
            )
    extra = set(bundle.location.children()) - set(expected) - {MANIFEST}
    if extra:
        raise BundleError(f"'{bundle.location / min(extra)}' is not part of the bundle; remove it")


def _read_table(place: Location) -> pa.Table:
    try:
        return pq.read_table(place.path, filesystem=place.filesystem)
    except (OSError, pa.ArrowException) as error:
        raise BundleError(f"'{place}' is missing or damaged: {error}; get the bundle again") from None


def _read_weights(place: Location) -> dict[str, Tensor]:
    try:
        if place.is_local:
            return safetensors.torch.load_file(place.path)
        return safetensors.torch.load(place.read())
    except (OSError, SafetensorError) as error:
        raise BundleError(f"'{place}' is missing or damaged: {error}; get the bundle again") from None


def _finite_state(network: Network) -> dict[str, Tensor]:
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise BundleError(f"weight '{name}' holds NaN or infinity; such a network is not written as a bundle")
    return state


def _write_small(items: pa.Table, stream: Any) -> None:
    """Parquet that suits ids: in order or all different, so dictionaries only add to them: a quarter of the bytes."""
    encoding = {}
    for field in items.schema:
        if pa.types.is_integer(field.type):
            encoding[field.name] = "DELTA_BINARY_PACKED"
        elif pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            encoding[field.name] = "DELTA_LENGTH_BYTE_ARRAY"
    others = [f"{name}.list.element" for name in items.column_names if name not in encoding]
    pq.write_table(items, stream, compression="zstd", use_dictionary=others, column_encoding=encoding)


def _check_items(items: pa.Table, n_items: int) -> None:
    missing = [column for column in ITEM_COLUMNS if column not in items.column_names]
    if missing:
        raise BundleError(f"the item table has no column '{missing[0]}'; it needs {', '.join(ITEM_COLUMNS)}")
    if items.num_rows != n_items:
        raise BundleError(f"the item table has {items.num_rows} rows, the network {n_items} items; use its own table")
    if not np.array_equal(items.column(ITEM_INDEX).to_numpy(), np.arange(1, n_items + 1)):
        raise BundleError(f"row i of the item table must have {ITEM_INDEX} i + 1; sort it by {ITEM_INDEX}")


def _exists(location: Location) -> BundleError:
    return BundleError(f"'{location}' is there already and bundles are never overwritten; choose another path")


def _lineage(given: Mapping[str, Any]) -> dict[str, Any]:
    return {"parent": None, "dataset": None, **made_here(), "versions": _versions()} | dict(given)


def made_here() -> dict[str, str | None]:
    """This process' command, and the commit of its folder: what a lineage has where nothing else is told."""
    return {"command": shlex.join(sys.argv), "commit": _commit()}


def _versions() -> dict[str, str]:
    ray = metadata.version("ray")  # this layer imports no Ray
    return {"elasticrec": __version__, "torch": torch.__version__, "ray": ray, "python": platform.python_version()}


def _commit() -> str | None:
    """The git commit of the working folder (`-dirty` when files differ from it); none outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, cwd=os.getcwd())
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
