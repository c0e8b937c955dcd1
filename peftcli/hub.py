"""Whether the Hugging Face Hub can be reached at all, asked once and quickly.

Its clients retry for half a minute before they say so; whoever asks here first can read the local cache at once.
"""

from __future__ import annotations

import socket
from functools import cache
from urllib.parse import urlsplit

PROBE_SECONDS = 3.0
PORTS = {"http": 80, "https": 443, "socks4": 1080, "socks5": 1080, "socks5h": 1080}


@cache
def reachable() -> bool:
    """Returns whether the hub answers; where a proxy stands in between, whether that does."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with socket.create_connection(_first_stop(constants.ENDPOINT), timeout=PROBE_SECONDS):
            return True
    except (OSError, ValueError):  # a port that is no number
        return False


def _first_stop(endpoint: str) -> tuple[str, int]:
    """Returns the host and port that a request to `endpoint` goes to first: the proxy's, where there is one."""
    from urllib.request import getproxies_environment, proxy_bypass

    url = urlsplit(endpoint)
    proxies = getproxies_environment()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(url.hostname or ""):
        url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return url.hostname or "", url.port or PORTS.get(url.scheme, 443)
