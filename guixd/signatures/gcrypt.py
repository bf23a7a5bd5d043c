"""The few functions of libgcrypt that are needed, by ctypes.

The library is looked for at the first use: who never signs does without it.  After
its initialisation it may be called in several threads at once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Final

from guixd.errors import SignatureError
from guixd.formats import sexp
from guixd.formats.sexp import Expression

LIBRARY: Final = "libgcrypt.so.20"
_DISABLE_SECURE_MEMORY, _END_INITIALISATION, _IS_INITIALISED = 37, 38, 39
_CANONICAL = 1
_BAD_SIGNATURE = 8
_CODE = 0xFFFF
_Pointer = ctypes.c_void_p
_Handle = ctypes.POINTER(_Pointer)


@cache
def _library() -> ctypes.CDLL:
    """Return the library, loaded and initialised.

    :raises SignatureError: it is not there.
    """
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise SignatureError(
            f"signatures need the library {LIBRARY}, which cannot be loaded: {error}"
            " (Debian has it in the package libgcrypt20)"
        ) from error

    def declare(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
        return function  # type: ignore[no-any-return]

    check_version = declare("gcry_check_version", ctypes.c_char_p, ctypes.c_char_p)
    control = declare("gcry_control", ctypes.c_uint, ctypes.c_int, ctypes.c_int)
    declare("gcry_strerror", ctypes.c_char_p, ctypes.c_uint)
    declare("gcry_sexp_new", ctypes.c_uint, _Handle, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int)
    declare("gcry_sexp_release", None, _Pointer)
    declare(
        "gcry_sexp_sprint",
        ctypes.c_size_t,
        _Pointer,
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_size_t,
    )
    declare("gcry_pk_sign", ctypes.c_uint, _Handle, _Pointer, _Pointer)
    declare("gcry_pk_verify", ctypes.c_uint, _Pointer, _Pointer, _Pointer)
    # The program that embeds us may have initialised it in its own way.
    if not control(_IS_INITIALISED, 0):
        if check_version(None) is None:
            raise SignatureError(f"the library {LIBRARY} cannot be initialised")
        control(_DISABLE_SECURE_MEMORY, 0)
        control(_END_INITIALISATION, 0)
    return library


def sign(data: Expression, secret_key: Expression) -> Expression:
    """Return the `(sig-val ...)` of DATA, a `(data ...)`.

    :raises SignatureError: the key cannot be used.
    """
    library = _library()
    result = _Pointer()
    with _object(data) as message, _object(secret_key) as key:
        code = library.gcry_pk_sign(ctypes.byref(result), message, key)
    try:
        if code:
            raise SignatureError(f"cannot sign: {_explain(code)}")
        return _expression(result)
    finally:
        library.gcry_sexp_release(result)


def is_genuine(signature: Expression, data: Expression, public_key: Expression) -> bool:
    """Whether SIGNATURE, a `(sig-val ...)`, was made of DATA by the owner of PUBLIC_KEY.

    What is not even a signature or a key is not genuine, either.

    :raises SignatureError: the library is not there.
    """
    library = _library()
    try:
        with _object(signature) as given, _object(data) as message, _object(public_key) as key:
            return not library.gcry_pk_verify(given, message, key)
    except _UnusableError:
        return False


class _UnusableError(SignatureError):
    """The library does not take an expression."""


@contextmanager
def _object(expression: Expression) -> Iterator[_Pointer]:
    """Give EXPRESSION as an object of the library, which is freed in the end."""
    library = _library()
    text = sexp.canonical(expression)
    handle = _Pointer()
    code = library.gcry_sexp_new(ctypes.byref(handle), text, len(text), 1)
    if code:
        raise _UnusableError(f"unusable S-expression: {_explain(code)}")
    try:
        yield handle
    finally:
        library.gcry_sexp_release(handle)


def _expression(handle: _Pointer) -> Expression:
    library = _library()
    size = library.gcry_sexp_sprint(handle, _CANONICAL, None, 0)
    buffer = ctypes.create_string_buffer(size)
    written = library.gcry_sexp_sprint(handle, _CANONICAL, buffer, size)
    return sexp.parse(buffer.raw[:written])


def _explain(code: int) -> str:
    text: bytes = _library().gcry_strerror(code) or b""
    return text.decode("utf-8", "replace")
