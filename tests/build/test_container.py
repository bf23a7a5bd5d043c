"""Planning containers; nothing is run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from guixd.build.container import Host, environment, plan
from guixd.build.program import prepare
from guixd.build.users import BuildUser
from guixd.errors import SandboxError
from guixd.formats.derivation import Derivation, Output
from guixd.formats.path import StoreDirectory, StorePath
from guixd.sandbox.spec import Bind, Ids, SandboxSpec, UserNamespace
from guixd.settings import Settings

STORE = StoreDirectory()
DRV = STORE.child("0" * 32 + "-hello.drv")
OUT = STORE.child("1" * 32 + "-hello")
INPUT = STORE.child("2" * 32 + "-input")
SETTINGS = Settings(system="x86_64-linux")
_CHARACTERS = st.characters(exclude_characters="\0=", exclude_categories=("Cs",))
HOST = Host(1000, 1001)
USER = BuildUser("b1", 30001, 30000, (30000, 36))


def derivation(fixed: bool = False, **changes: Any) -> Derivation:
    output = Output(OUT, *(("sha256", "00" * 32) if fixed else ()))
    builder = INPUT + "/bin/sh"
    plain = Derivation({"out": output}, {}, (INPUT,), "x86_64-linux", builder, ("-c", "x"), {})
    return replace(plain, **changes)


def planned(drv: Derivation | None = None, **changes: Any) -> SandboxSpec:
    options: dict[str, Any] = {
        "build_directory": "/tmp/guix-build-hello.drv-7/top",
        "private": DRV + ".chroot",
        "user": USER,
        "settings": SETTINGS,
        "cores": 4,
        "host": HOST,
        **changes,
    }
    inputs = options.pop("inputs", (INPUT, OUT))
    return plan(drv or derivation(), DRV, inputs, **options)


class PlanTests(SynchronousTestCase):
    def test_builder(self) -> None:
        """D15: program, arguments and directory."""
        spec = planned()
        self.assertEqual(spec.program, INPUT + "/bin/sh")
        self.assertEqual(spec.arguments, ("sh", "-c", "x"))
        self.assertEqual(spec.directory, "/tmp/guix-build-hello.drv-0")
        self.assertEqual(spec.store, "/gnu/store")

    def test_modes(self) -> None:
        """X31: who builders are; never root unless that is asked for."""
        self.assertEqual(planned().ids, Ids(30001, 30000, (30000, 36)))
        self.assertIsNone(planned().user_namespace)
        rootless = planned(user=None)
        self.assertIsNone(rootless.ids)
        self.assertEqual(rootless.user_namespace, UserNamespace(30001, 30000, 1000, 1001))
        self.assertRaises(SandboxError, planned, user=None, host=Host(0, 0))
        asked = planned(user=None, host=Host(0, 0, kvm_gid=36), allow_root=True)
        self.assertEqual(asked.user_namespace, UserNamespace(30001, 30000, 0, 0, 36))

    def test_without_container(self) -> None:
        """X36: nothing is made or mounted."""
        spec = planned(private=None, build_directory="/tmp/guix-build-hello.drv-7")
        self.assertEqual((spec.base, spec.files, spec.binds), (None, (), ()))
        self.assertEqual(spec.directory, "/tmp/guix-build-hello.drv-7")
        self.assertIsNone(planned(private=None, user=None).user_namespace)

    def test_binds(self) -> None:
        """X5, X26: sorted by target, outputs left out, what is of the store read-only."""
        places = (("/b", "/b"), ("/a", "/gnu/store/x"), (str(INPUT), "/elsewhere"))
        binds = planned(settings=replace(SETTINGS, chroot_directories=places)).binds
        self.assertEqual([bind.target for bind in binds], sorted(bind.target for bind in binds))
        rest = [bind for bind in binds if not bind.target.startswith("/dev/")]
        self.assertEqual(
            rest,
            [
                Bind("/gnu/store/x", "/a", True),
                Bind("/b", "/b", False),
                Bind(DRV + ".chroot/store", "/gnu/store", False),
                Bind("/elsewhere", INPUT, False),
                Bind(DRV + ".chroot/tmp", "/tmp", False),
                Bind("/tmp/guix-build-hello.drv-7/top", "/tmp/guix-build-hello.drv-0", False),
            ],
        )

    def test_own_dev(self) -> None:
        """X27: nothing is put below a /dev of the administrator."""
        spec = planned(settings=replace(SETTINGS, chroot_directories=(("/dev", "/dev"),)))
        names = [file.path for file in spec.files] + [bind.target for bind in spec.binds]
        self.assertEqual([name for name in names if name.startswith("/dev")], ["/dev"])
        assert spec.base is not None
        self.assertEqual((spec.base.files, spec.base.binds), ((), ()))
        self.assertEqual((spec.base.mounts, spec.mounts), (("/proc",), ("/dev/shm",)))
        spec = planned(settings=replace(SETTINGS, chroot_directories=(("/dev/null", "/x"),)))
        assert spec.base is not None
        self.assertNotIn("/dev/null", [bind.target for bind in spec.base.binds])
        self.assertIn("/dev/zero", [bind.target for bind in spec.base.binds])
        self.assertIn(Bind("/x", "/dev/null", False), spec.binds)

    def test_fixed_output(self) -> None:
        """X28: the host's network files; `lo` only if the host is isolated."""
        spec = planned(derivation(fixed=True))
        targets = [bind.target for bind in spec.binds if bind.target.startswith("/etc")]
        names = ["hosts", "nsswitch.conf", "resolv.conf", "services"]
        self.assertEqual(targets, ["/etc/" + name for name in names])
        self.assertNotIn("/etc/hosts", [file.path for file in spec.files])
        self.assertEqual((spec.loopback, planned().loopback), (False, True))
        isolated = replace(SETTINGS, isolate_host_loopback=True)
        self.assertTrue(planned(derivation(fixed=True), settings=isolated).loopback)

    def test_personality(self) -> None:
        """X13: 32 bits, and an old kernel's name."""
        old = replace(SETTINGS, impersonate_linux_26=True)
        arm = replace(SETTINGS, system="aarch64-linux", impersonate_linux_26=True)
        for system, chosen, machine, persona in [
            ("x86_64-linux", SETTINGS, "x86_64", 0x40000),
            ("i686-linux", SETTINGS, "x86_64", 0x40008),
            ("x86_64-linux", old, "x86_64", 0x60000),
            ("i686-linux", old, "x86_64", 0x60008),
            ("armhf-linux", arm, "aarch64", 0x40008),
            ("aarch64-linux", arm, "aarch64", 0x40000),
        ]:
            spec = planned(
                derivation(platform=system), settings=chosen, host=Host(1, 1, machine=machine)
            )
            self.assertEqual(spec.personality, persona, (system, chosen.system))

    def test_platforms(self) -> None:
        """B30: other kernels' programs are not tried, other machines' are."""
        for system, unsupported, foreign in [
            ("x86_64-linux", False, False),
            ("i686-linux", False, False),
            ("aarch64-linux", False, True),
            ("i586-gnu", True, False),
        ]:
            spec = planned(derivation(platform=system))
            texts = (spec.unsupported_platform, spec.foreign_platform)
            self.assertEqual((bool(texts[0]), bool(texts[1])), (unsupported, foreign), system)
            line = f"@ unsupported-platform {DRV} {system}\n"
            self.assertTrue(all(text == "" or text.startswith(line) for text in texts))


class EnvironmentTests(SynchronousTestCase):
    def test_impure(self) -> None:
        """B18, D10: variables of the daemon reach builds with a fixed output only."""
        variables = {"impureEnvVars": "http_proxy  unset\nHOME", "http_proxy": "mine"}
        for fixed in True, False:
            drv = derivation(fixed, environment=variables)
            got = dict(environment(drv, "/b", SETTINGS, 0, {"http_proxy": "p", "HOME": "/h"}))
            expected = ("p", "", "/h") if fixed else ("mine", None, "/homeless-shelter")
            self.assertEqual((got["http_proxy"], got.get("unset"), got["HOME"]), expected)

    @settings(deadline=None, max_examples=100)
    @given(st.dictionaries(st.text(_CHARACTERS), st.text(_CHARACTERS)))
    def test_precedence(self, variables: dict[str, str]) -> None:
        """D9: the derivation's variables are kept but for those of the directory."""
        got = environment(derivation(environment=variables), "/b", SETTINGS, 3, {})
        names = [name.encode("utf-8", "surrogateescape") for name, _ in got]
        self.assertEqual(names, sorted(set(names)))
        fixed = {"NIX_BUILD_TOP", "TMPDIR", "TEMPDIR", "TMP", "TEMP", "PWD"}
        expected = {
            "PATH": "/path-not-set",
            "HOME": "/homeless-shelter",
            "NIX_STORE": "/gnu/store",
            "NIX_BUILD_CORES": "3",
            **variables,
            **dict.fromkeys(fixed, "/b"),
        }
        self.assertEqual(dict(got), expected)


class NamesTests(SynchronousTestCase):
    def test_item_type(self) -> None:
        """X5: targets and sources are plain strings of the plan."""
        self.assertIsInstance(OUT, StorePath)
        self.assertIn(INPUT.encode(), prepare(1, planned()))
