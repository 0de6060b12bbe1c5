"""A URL in, the answer out: HTTP as all commands speak it, past the proxies of the environment.

httpx reads all certificates of the machine for every client that it makes, 50 ms of a core; whoever polls would do
little else. Here they are read once a process.
"""

import functools
import ssl
from collections.abc import Mapping
from typing import Any

import httpx


@functools.cache
def certificates() -> ssl.SSLContext:
    """Who is trusted: httpx' own list, or SSL_CERT_FILE."""
    return httpx.create_ssl_context()


def connect(**options: Any) -> httpx.Client:
    """A client of httpx; `options` are its own. The caller closes it."""
    return httpx.Client(verify=certificates(), trust_env=False, **options)


def get(url: str, *, headers: Mapping[str, str] | None = None, timeout_s: float = 10) -> httpx.Response:
    """Raises httpx.HTTPError where nothing answers."""
    with connect(headers=headers, timeout=timeout_s) as client:
        return client.get(url)
