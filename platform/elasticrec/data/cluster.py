"""The address of a Ray cluster, as a user gives it, in; this process connected to it, or one message why not, out.

Ray itself goes on trying for minutes where nothing listens, and shows where in its code an address was refused.
"""

import os
import socket
import urllib.parse
from typing import Any, Final

from elasticrec.errors import ConfigError

_CONNECT_S: Final = 5.0
_FOUND_BY_RAY: Final = ("auto", "local")
_FORMS: Final = "HOST:PORT of the head (its port is 6379 unless it was started with another), ray://HOST:PORT or auto"


def connect(address: str | None, **options: Any) -> None:
    """`ray.init`, once something listens there.

    Args:
        address: of the cluster; without one, or with `auto`, that of RAY_ADDRESS, else what Ray finds.
        options: those of `ray.init`.

    Raises:
        ConfigError: it is no address of a cluster, nothing listens there, or Ray refuses it.
    """
    import ray

    told = address
    if address in (None, "auto"):
        told = os.environ.get("RAY_ADDRESS") or address
    if told and told not in _FOUND_BY_RAY:
        require_listening(told)
    try:
        ray.init(address=address, **options)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"Ray does not connect to '{told or 'auto'}': {error}") from None


def require_listening(address: str) -> None:
    """Raises ConfigError when it is no address that Ray takes, or nothing listens there.

    A scheme of somebody else's (`anyscale://`) is a plug-in of Ray, which alone knows what is behind it.
    """
    scheme, _, place = address.rpartition("://")
    if scheme not in ("", "ray", "http", "https"):
        return
    host, port = _host_and_port(address, scheme, place.rstrip("/"))
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except (OSError, UnicodeError) as error:  # of a name that can be no host, the latter
        raise ConfigError(
            f"no Ray cluster answers at '{address}': {error}; start one there, correct RAY_ADDRESS (or --address), or "
            "leave it out"
        ) from None


def _host_and_port(address: str, scheme: str, place: str) -> tuple[str, int]:
    if scheme in ("http", "https"):
        raise ConfigError(f"'{address}' is the address of Ray's dashboard; as that of a cluster give {_FORMS}")
    try:
        parts = urllib.parse.urlsplit(f"//{place}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port or parts.netloc != place or "@" in place:
        raise ConfigError(f"'{address}' is no address of a Ray cluster; give {_FORMS}")
    return host, port
