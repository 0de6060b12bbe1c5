"""`elasticrec bundle …`: look at a bundle, check it, and export it."""

import json
from typing import Annotated, Literal

import tyro

from elasticrec.artifact.bundle import open_bundle, verify_bundle
from elasticrec.artifact.manifest import render
from elasticrec.artifact.registry import resolve_reference

Reference = Annotated[str, tyro.conf.Positional]


def show(bundle: Reference) -> None:
    """Prints the manifest of a bundle.

    Args:
        bundle: folder, URI, or REGISTRY#NAME@LABEL.
    """
    opened = open_bundle(resolve_reference(bundle), verify=False)
    print(json.dumps(json.loads(render(opened.manifest)), indent=2))


def verify(bundle: Reference) -> None:
    """Reads every file of a bundle and compares its checksum.

    Args:
        bundle: folder, URI, or REGISTRY#NAME@LABEL.
    """
    uri = resolve_reference(bundle)
    verify_bundle(uri)
    print(f"{uri}: every file is as it was written")


def export(bundle: Reference, out: str, format: Literal["onnx", "pt2", "executorch-ready"] = "onnx") -> None:
    """Writes a bundle for a runtime without Ray, and compares the file's scores with the bundle's.

    Args:
        bundle: folder, URI, or REGISTRY#NAME@LABEL.
        out: a new local folder for the model, its items and edge.json.
        format: onnx needs no torch where it runs; executorch-ready is for executorch.exir.to_edge.
    """
    from elasticrec.artifact.export.folder import export_bundle
    from elasticrec.cli.progress import bar

    opened = open_bundle(resolve_reference(bundle))
    with bar(f"exporting to {format}"):
        made = export_bundle(opened, format, out)
    print(f"{made.folder / made.file}: {made.bytes:,} bytes")
    print(
        f"compared on {made.parity.users} made-up users: largest difference of a score {made.parity.largest:.2g}, "
        f"other ten best for {made.parity.different}"
    )
