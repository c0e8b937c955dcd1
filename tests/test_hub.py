"""Whether the hub can be reached is asked of whoever a request goes to first, once and quickly."""

import socket

import pytest
from huggingface_hub import constants

from peftcli import hub

VARIABLES = [f"{scheme}_proxy" for scheme in ("http", "https", "all", "no")]


@pytest.fixture
def asked(monkeypatch):
    """The hosts that are asked; none answers unless it is in `answering`."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    stops = []

    def connect(address, timeout):
        assert timeout <= 3
        stops.append(address)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", connect)
    hub.reachable.cache_clear()
    yield stops
    hub.reachable.cache_clear()


def test_the_hub_itself(asked):
    assert not hub.reachable()
    assert not hub.reachable()
    assert asked == [("hub.example", 443)]


@pytest.mark.parametrize(
    ("name", "proxy", "stop"),
    [
        ("HTTPS_PROXY", "http://me:secret@proxy.example:3128", ("proxy.example", 3128)),
        ("https_proxy", "proxy.example:8080", ("proxy.example", 8080)),
        ("ALL_PROXY", "socks5h://proxy.example", ("proxy.example", 1080)),
        ("HTTP_PROXY", "http://proxy.example", ("hub.example", 443)),  # for addresses of another kind
    ],
)
def test_a_proxy_comes_first(asked, monkeypatch, name, proxy, stop):
    monkeypatch.setenv(name, proxy)
    assert not hub.reachable()
    assert asked == [stop]


def test_a_host_that_needs_no_proxy(asked, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "localhost,.example")
    assert not hub.reachable()
    assert asked == [("hub.example", 443)]


def test_an_address_that_is_none(asked, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:port")
    assert not hub.reachable()
    assert asked == []


def test_told_to_be_offline(asked, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub.reachable()
    assert asked == []


def test_it_answers(asked, monkeypatch):
    with socket.socket() as listening:
        monkeypatch.undo()
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
        assert hub.reachable()
