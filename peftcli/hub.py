"""Whether the Hugging Face Hub can be reached at all, asked once and quickly.

Its clients retry for half a minute before they say so; whoever asks here first can read the local cache at once.
"""

from __future__ import annotations

import os
import socket
from functools import cache
from urllib.parse import urlsplit

PROBE_SECONDS = 3.0
PROXY_VARIABLES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


@cache
def reachable() -> bool:
    """Returns whether the hub answers; True where a proxy stands in between, which only the client can tell."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in PROXY_VARIABLES):
        return True
    url = urlsplit(constants.ENDPOINT)
    try:
        with socket.create_connection((url.hostname or "", url.port or 443), timeout=PROBE_SECONDS):
            return True
    except OSError:
        return False
