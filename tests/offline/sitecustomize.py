"""sitecustomize: connections and look-ups that this process asks for -> refused, but for those of this machine.

A Python that has this folder on its PYTHONPATH imports it at its start; the tests' own takes it from fixtures_network.
"""

import os
import sys
from typing import Any

REACHES = ("socket.connect", "socket.sendto", "socket.sendmsg")
RESOLVES = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")


class ForeignHostError(RuntimeError):
    """No OSError, which whoever tries a network would take for a bad line and pass over."""


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook, which Python's sockets call, whatever library uses them. Raises ForeignHostError.

    Who gives `connect` a name and no address, as hardly anybody does, has looked it up before the hook is called.
    """
    if event not in REACHES and event not in RESOLVES:
        return
    import socket  # here, since most processes never come so far

    if event in REACHES:
        connection, address = arguments
        if connection.family == socket.AF_UNIX or address is None:  # None: to where it is connected already
            return
        host = name_of(address[0])
        is_known = is_here(host)
    else:
        host = name_of(arguments[0])
        is_known = is_here(host) or host == socket.gethostname()
    if not is_known:
        test = os.environ.get("PYTEST_CURRENT_TEST", "a test")
        raise ForeignHostError(f"{test} wants to reach {host}: tests reach nothing but this machine")


def name_of(host: str | bytes | bytearray | None) -> str:
    return host.decode() if isinstance(host, bytes | bytearray) else host or ""


def is_here(host: str) -> bool:
    """Whether it names this machine: a loopback address, or none, which stands for all its own."""
    from ipaddress import ip_address

    if host in ("", "localhost"):
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


if __name__ == "sitecustomize":
    sys.addaudithook(refuse)
