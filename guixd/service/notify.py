"""Telling the service manager how the daemon is (systemd's sd_notify(3))."""

from __future__ import annotations

import socket
from collections.abc import Mapping


def notify(environ: Mapping[str, str], state: str) -> bool:
    """Send STATE, such as `READY=1`, to the manager that ENVIRON names.

    :return: whether there is one and it could be told.
    """
    address = environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
            sender.connect(address)
            sender.send(state.encode())
    except OSError:
        return False
    return True
