"""What to do when the container of a build cannot be set up."""

from __future__ import annotations

from collections.abc import Collection
from errno import EACCES, EINVAL, EMFILE, ENFILE, ENOSPC, EPERM, EUSERS

_REFUSED = (EPERM, EACCES, ENOSPC, EUSERS)

_ADVICE: tuple[tuple[str, Collection[int], str], ...] = (
    (
        "user namespace",
        _REFUSED,
        "a daemon without privileges needs user namespaces, which the kernel's settings"
        " 'user.max_user_namespaces', 'kernel.unprivileged_userns_clone' and"
        " 'kernel.apparmor_restrict_unprivileged_userns' may keep from it",
    ),
    (
        "namespaces",
        _REFUSED,
        "see the kernel's settings 'user.max_mnt_namespaces' and the like, and whether the daemon"
        " itself is in a container that does not let it make others",
    ),
    (
        "private mounts",
        (EINVAL,),
        "the daemon's root directory must be a mount point, which it is not below chroot(1)",
    ),
    (
        "mount /proc",
        (EPERM,),
        "parts of the daemon's own /proc are hidden, as in some containers, so that the kernel"
        " allows no other",
    ),
    (
        "bind mounts",
        (ENOSPC,),
        "`guix gc' helps if the disk is full; else see the kernel's setting 'fs.mount-max'",
    ),
    ("", (EMFILE, ENFILE), "the daemon needs a larger limit of open files"),
)


def advice(phase: str, number: int, text: str) -> str:
    """Return what may help when PHASE has failed; empty if that is not known.

    :param number: of the error, 0 if it has none.
    :param text: what was said of it.
    """
    for begin, numbers, help_text in _ADVICE:
        if number in numbers and (phase.startswith(begin) or text.startswith(begin)):
            return help_text + "; '--disable-chroot' does without containers" * bool(begin)
    return ""
