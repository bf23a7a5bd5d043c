"""Planning the network of a build; nothing is run."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from guixd.build import uplink
from guixd.build.uplink import NoUplink, connect
from guixd.sandbox.spec import Bind, Ids, SandboxSpec, UserNamespace
from tests.build.test_container import derivation, planned
from tests.support import temporary_directory
from tests.uplink.slirp import script


class ConnectTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = str(script(Path(temporary_directory(self)), "#!/bin/true\n"))
        self.patch(uplink, "DEVICE", "/dev/null")

    def connected(self, spec: SandboxSpec | None = None, **options: Any) -> SandboxSpec:
        options = {
            "environ": {"PATH": self.directory},
            "machine": "x86_64",
            "isolated": False,
            **options,
        }
        return connect(spec or planned(derivation(fixed=True)), **options)

    def test_decision(self) -> None:
        """X28: program and device must be there; without, it is said why."""
        for options, why in [
            ({"environ": {"PATH": self.directory + "/none"}}, "PATH"),
            ({"machine": "vax"}, "filter"),
        ]:
            with self.assertRaises(NoUplink) as caught:
                self.connected(**options)
            self.assertIn(why, caught.exception.text)
        os.chmod(self.directory + "/slirp4netns", 0o644)
        self.assertRaises(NoUplink, self.connected)
        os.chmod(self.directory + "/slirp4netns", 0o755)
        self.patch(uplink, "DEVICE", self.directory + "/none")
        with self.assertRaises(NoUplink) as caught:
            self.connected()
        self.assertIn(self.directory + "/none", caught.exception.text)

    def test_files(self) -> None:
        """X29: name servers and names are the build's own; with isolation, names are the host's."""
        before = planned(derivation(fixed=True))
        for isolated, own in (
            (False, ["/etc/resolv.conf", "/etc/hosts"]),
            (
                True,
                ["/etc/resolv.conf"],
            ),
        ):
            spec = self.connected(before, isolated=isolated)
            self.assertEqual([file.path for file in spec.files[len(before.files) :]], own)
            self.assertEqual(spec.files[len(before.files)].content, "nameserver 10.0.2.3")
            gone = {bind.target for bind in before.binds} - {bind.target for bind in spec.binds}
            self.assertEqual(gone, set(own))
            assert spec.uplink is not None
            self.assertEqual(spec.uplink.localnet, not isolated)
            arguments = spec.uplink.process.arguments
            self.assertEqual("--disable-host-loopback" in arguments, isolated)
        self.assertEqual(replace(spec, uplink=None, files=(), binds=()).arguments, before.arguments)

    def test_administrators_file(self) -> None:
        """X26, X29: what the administrator maps stays."""
        own = Bind("/x", "/etc/resolv.conf")
        spec = self.connected(replace(planned(derivation(fixed=True)), binds=(own,)))
        self.assertEqual(spec.binds, (own,))

    def test_jail(self) -> None:
        """X29: who moves packets is never root, and sees but little, read-only."""
        spec = self.connected().uplink
        assert spec is not None
        jail = spec.process
        self.assertEqual(jail.ids, Ids(30001, 30000))
        self.assertTrue(all(bind.read_only and bind.optional for bind in jail.binds[:-1]))
        self.assertIn(self.directory, [bind.target for bind in jail.binds])
        self.assertEqual((jail.environment, jail.uplink), ((), None))
        self.assertTrue(jail.filter)
        shown = [bind.target for bind in jail.binds]
        self.assertFalse({"/", "/home", "/root", "/run", "/var", "/tmp", "/etc", "/dev"} & {*shown})
        rootless = replace(
            planned(derivation(fixed=True)),
            ids=None,
            user_namespace=UserNamespace(30001, 30000, 1000, 1001, 36),
        )
        spec = self.connected(rootless).uplink
        assert spec is not None
        self.assertEqual(spec.process.user_namespace, UserNamespace(30001, 30000, 1000, 1001, None))
        root = replace(rootless, user_namespace=UserNamespace(30001, 30000, 0, 0))
        self.assertRaises(NoUplink, self.connected, root)

    def test_hosts(self) -> None:
        """X29: names of the machine itself lead to it; other addresses stay."""
        for text, expected in [
            ("127.0.0.1 localhost\n127.0.1.1\tme\n", "10.0.2.2 localhost\n127.0.1.1\tme\n"),
            ("::1 localhost\nff02::1 ip6-allnodes\n", "fd00::2 localhost\nff02::1 ip6-allnodes\n"),
            (
                "127.0.0.11 a\n1127.0.0.1 b\n2001:db8::1 c",
                "127.0.0.11 a\n1127.0.0.1 b\n2001:db8::1 c",
            ),
        ]:
            self.assertEqual(uplink.reached_by_router(text), expected)

    @given(st.text("127.0:1f \n"))
    def test_any_hosts(self, text: str) -> None:
        """X29: nothing of the machine's loopback is left, and no line is lost."""
        got = uplink.reached_by_router(text)
        self.assertEqual(got.count("\n"), text.count("\n"))
        self.assertFalse({"127.0.0.1", "::1"} & {*got.split()})
