"""`elasticrec bundle …`: look at a bundle, and check it."""

import json
from typing import Annotated

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
