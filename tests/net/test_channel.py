"""Packets with descriptors between processes."""

from __future__ import annotations

import os
import resource
import socket
from errno import ETOOMANYREFS
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import DeferredQueue
from twisted.trial.unittest import TestCase

from guixd.net.channel import Channel
from guixd.net.spawning import pair
from tests.support import requires_root

NOBODY = 1_000_000 + os.getpid()
"""A uid of nobody else's."""


@requires_root
class DescriptorTests(TestCase):
    async def test_too_many_on_the_way(self) -> None:
        """X25: nothing is lost when a user has more descriptors on the way than it may."""
        ours, theirs = pair()
        arrived: DeferredQueue[list[Any]] = DeferredQueue()

        def received(message: list[Any], _data: bytes, descriptors: list[int]) -> None:
            arrived.put([*message, len(descriptors)])
            for descriptor in descriptors:
                os.close(descriptor)

        near = Channel(reactor, ours, lambda *_: None, lambda: None)
        far = Channel(reactor, theirs, received, lambda: None)
        self.addCleanup(far.close)
        self.addCleanup(near.close)
        sent = os.dup(0)
        full, receiver = pair()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        with full, receiver:
            full.setblocking(False)
            resource.setrlimit(resource.RLIMIT_NOFILE, (50, limits[1]))
            os.setresuid(NOBODY, NOBODY, 0)
            try:
                error = 0
                while not error:
                    try:
                        socket.send_fds(full, [b"!"], [0] * 20)
                    except OSError as failure:
                        error = failure.errno or 0
                near.send(["first"], descriptors=[sent])
                near.send(["second"])
            finally:
                os.setresuid(0, 0, 0)
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        self.assertEqual(error, ETOOMANYREFS)
        self.assertEqual(await arrived.get(), ["first", 1])
        self.assertEqual(await arrived.get(), ["second", 0])
