"""A bundle in, a version of a registry out, with the file by which replicas answer lone requests sooner."""

from elasticrec.artifact.bundle import Bundle
from elasticrec.artifact.manifest import ENCODER
from elasticrec.artifact.registry import Registry
from elasticrec.cli.progress import bar
from elasticrec.errors import ConfigError, ExportError


def publish_ready(registry: Registry, bundle: Bundle | str, name: str) -> str:
    """The new version. A network that has no graph is published without one, and it is said why."""
    return registry.publish(bundle, name, _graph)


def _graph(bundle: Bundle) -> dict[str, bytes]:
    from elasticrec.artifact.export.encoder import encoder_onnx  # late: exporters take long to import

    try:
        with bar("making the encoder's graph"):
            return {ENCODER: encoder_onnx(bundle.network())}
    except (ConfigError, ExportError) as error:
        print(f"without {ENCODER}, so lone requests take longer on a CPU: {error}")
        return {}
