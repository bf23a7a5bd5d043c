"""The little language of lists of content-addressed mirrors (spec: downloads §5).

Clients pass such a list as the text of a program that yields procedures.  It is read as
data and worked through here, with nothing but what is below and within narrow limits:
no input or output, nothing of Python.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from guixd.formats import hashes
from guixd.formats.scheme import BadDatum, Datum, Symbol, parse

LARGEST_TEXT = 64 << 10
MOST_STEPS = 10_000
DEEPEST = 100
LONGEST_STRING = 64 << 10
LONGEST_LIST = 1000
MOST_MADE = 1 << 20
"""Most characters and items of all values together."""
MOST_URLS = 32


class BadMirrors(ValueError):
    """The text does not do what such a list may."""


Value: TypeAlias = Any
"""`str`, `Symbol`, `int`, `bool`, `bytes`, a tuple of values, or something to call."""


class _Scope:
    """Variables, and those around them."""

    def __init__(self, values: dict[str, Value], outer: _Scope | None) -> None:
        self.values = values
        self._outer = outer

    def get(self, name: str) -> Value:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.values:
                return scope.values[name]
            scope = scope._outer
        raise BadMirrors(f"'{name}' is not known")


@dataclass(frozen=True, slots=True, eq=False)
class _Procedure:
    parameters: tuple[str, ...]
    body: tuple[Datum, ...]
    scope: _Scope


def urls(text: str, name: str, algorithm: str, digest: bytes) -> list[str]:
    """Return what the procedures of TEXT say for a file; those that say `#f` are left out.

    :param name: of the file.
    :raises BadMirrors: something else than strings comes out, or it takes too much.
    """
    if len(text) > LARGEST_TEXT:
        raise BadMirrors("the list of mirrors is too long")
    try:
        datum = parse(text)
    except BadDatum as error:
        raise BadMirrors(str(error)) from None
    machine = _Machine()
    procedures = machine.evaluate(datum, _Scope(dict(_GLOBALS), None), 0)
    if not isinstance(procedures, tuple) or len(procedures) > MOST_URLS:
        raise BadMirrors("the value is no short list")
    found = []
    for procedure in procedures:
        url = machine.apply(procedure, (name, Symbol(algorithm), digest), 0)
        if url is False:
            continue
        if not _is_string(url):
            raise BadMirrors("what a procedure returns is no string")
        found.append(url)
    return found


class _Machine:
    def __init__(self) -> None:
        self._steps = self._made = 0

    def _step(self, depth: int) -> None:
        self._steps += 1
        if self._steps > MOST_STEPS:
            raise BadMirrors("it takes too long")
        if depth > DEEPEST:
            raise BadMirrors("it goes too deep")

    def evaluate(self, form: Datum, scope: _Scope, depth: int) -> Value:
        """Return the value of FORM."""
        self._step(depth)
        if isinstance(form, Symbol):
            return scope.get(str(form))
        if not isinstance(form, tuple):
            return form
        if not form:
            raise BadMirrors("an empty form")
        head, *rest = form
        if isinstance(head, Symbol):
            special = _SPECIAL.get(head)
            if special is not None:
                return special(self, tuple(rest), scope, depth + 1)
        procedure = self.evaluate(head, scope, depth + 1)
        arguments = tuple(self.evaluate(part, scope, depth + 1) for part in rest)
        return self.apply(procedure, arguments, depth + 1)

    def apply(self, procedure: Value, arguments: tuple[Value, ...], depth: int) -> Value:
        """Return what PROCEDURE returns."""
        self._step(depth)
        if isinstance(procedure, _Procedure):
            if len(arguments) != len(procedure.parameters):
                raise BadMirrors("wrong number of arguments")
            inner = _Scope(dict(zip(procedure.parameters, arguments, strict=True)), procedure.scope)
            return self.sequence(procedure.body, inner, depth)
        if procedure is _map:
            if len(arguments) != 2 or not isinstance(arguments[1], tuple):
                raise BadMirrors("map wants a procedure and a list")
            return tuple(self.apply(arguments[0], (item,), depth + 1) for item in arguments[1])
        if not isinstance(procedure, _Primitive):
            raise BadMirrors("what is called is no procedure")
        result = procedure.call(arguments)
        if isinstance(result, str | bytes | tuple):
            self._made += len(result)
        if self._made > MOST_MADE:
            raise BadMirrors("it makes too much")
        return result

    def sequence(self, body: Sequence[Datum], scope: _Scope, depth: int) -> Value:
        """Evaluate all of BODY; return the last value."""
        value: Value = False
        for form in body:
            value = self.evaluate(form, scope, depth + 1)
        return value


# Special forms.

_Special: TypeAlias = Callable[[_Machine, tuple[Datum, ...], _Scope, int], Value]


def _quote(machine: _Machine, rest: tuple[Datum, ...], scope: _Scope, depth: int) -> Value:
    if len(rest) != 1:
        raise BadMirrors("quote wants one thing")
    return rest[0]


def _if(machine: _Machine, rest: tuple[Datum, ...], scope: _Scope, depth: int) -> Value:
    if len(rest) not in (2, 3):
        raise BadMirrors("if wants two or three things")
    if machine.evaluate(rest[0], scope, depth) is not False:
        return machine.evaluate(rest[1], scope, depth)
    return machine.evaluate(rest[2], scope, depth) if len(rest) == 3 else False


def _cond(machine: _Machine, rest: tuple[Datum, ...], scope: _Scope, depth: int) -> Value:
    for clause in rest:
        if not isinstance(clause, tuple) or not clause:
            raise BadMirrors("cond wants clauses")
        test = True if clause[0] == Symbol("else") else machine.evaluate(clause[0], scope, depth)
        if test is not False:
            return machine.sequence(clause[1:], scope, depth) if len(clause) > 1 else test
    return False


def _and(machine: _Machine, rest: tuple[Datum, ...], scope: _Scope, depth: int) -> Value:
    value: Value = True
    for form in rest:
        value = machine.evaluate(form, scope, depth)
        if value is False:
            break
    return value


def _or(machine: _Machine, rest: tuple[Datum, ...], scope: _Scope, depth: int) -> Value:
    value: Value = False
    for form in rest:
        value = machine.evaluate(form, scope, depth)
        if value is not False:
            break
    return value


def _let(machine: _Machine, rest: tuple[Datum, ...], scope: _Scope, depth: int) -> Value:
    inner = _Scope({}, scope)
    for name, form in _bindings(rest):
        inner.values[name] = machine.evaluate(form, scope, depth)
    return machine.sequence(rest[1:], inner, depth)


def _let_star(machine: _Machine, rest: tuple[Datum, ...], scope: _Scope, depth: int) -> Value:
    inner = _Scope({}, scope)
    for name, form in _bindings(rest):
        value = machine.evaluate(form, inner, depth)
        inner = _Scope({name: value}, inner)
    return machine.sequence(rest[1:], inner, depth)


def _bindings(rest: tuple[Datum, ...]) -> list[tuple[str, Datum]]:
    if len(rest) < 2 or not isinstance(rest[0], tuple):
        raise BadMirrors("let wants bindings and a body")
    pairs = []
    for binding in rest[0]:
        if not (isinstance(binding, tuple) and len(binding) == 2):
            raise BadMirrors("let wants bindings of one name and one value")
        name, form = binding
        if not isinstance(name, Symbol):
            raise BadMirrors("let wants names")
        pairs.append((str(name), form))
    return pairs


def _define(machine: _Machine, rest: tuple[Datum, ...], scope: _Scope, depth: int) -> Value:
    if len(rest) < 2:
        raise BadMirrors("define wants a name and a value")
    target, body = rest[0], rest[1:]
    while isinstance(target, tuple) and target and isinstance(target[0], tuple):
        # A procedure that returns one.
        body = ((Symbol("lambda"), target[1:], *body),)
        target = target[0]
    if isinstance(target, tuple):
        name, *parameters = target or (0,)
        value: Value = _Procedure(_names(tuple(parameters)), body, scope)
    else:
        name, value = target, machine.evaluate(body[0], scope, depth)
    if not isinstance(name, Symbol):
        raise BadMirrors("define wants a name")
    scope.values[str(name)] = value
    return False


def _lambda(machine: _Machine, rest: tuple[Datum, ...], scope: _Scope, depth: int) -> Value:
    if len(rest) < 2 or not isinstance(rest[0], tuple):
        raise BadMirrors("lambda wants parameters and a body")
    return _Procedure(_names(rest[0]), rest[1:], scope)


def _names(parameters: tuple[Datum, ...]) -> tuple[str, ...]:
    if not all(isinstance(parameter, Symbol) for parameter in parameters):
        raise BadMirrors("parameters are names")
    return tuple(str(parameter) for parameter in parameters)


def _nothing(machine: _Machine, rest: tuple[Datum, ...], scope: _Scope, depth: int) -> Value:
    return False


_SPECIAL: Mapping[str, _Special] = {
    Symbol(name): form
    for name, form in {
        "begin": lambda machine, rest, scope, depth: machine.sequence(rest, scope, depth),
        "quote": _quote,
        "if": _if,
        "cond": _cond,
        "and": _and,
        "or": _or,
        "let": _let,
        "let*": _let_star,
        "define": _define,
        "lambda": _lambda,
        "use-modules": _nothing,
        "module-autoload!": _nothing,
    }.items()
}


# Procedures that are given.


@dataclass(frozen=True, slots=True, eq=False)
class _Primitive:
    kinds: tuple[Callable[[Value], bool], ...]
    """What the arguments must be; the last one goes for all that follow if `many`."""
    function: Callable[..., Value]
    many: bool = False

    def call(self, arguments: tuple[Value, ...]) -> Value:
        kinds = self.kinds
        if self.many:
            kinds = kinds[:-1] + kinds[-1:] * (len(arguments) - len(kinds) + 1)
        if len(kinds) != len(arguments) or not all(
            kind(argument) for kind, argument in zip(kinds, arguments, strict=True)
        ):
            raise BadMirrors("a procedure gets arguments that it does not take")
        return self.function(*arguments)


def _is_string(value: Value) -> bool:
    return isinstance(value, str) and not isinstance(value, Symbol)


def _is_symbol(value: Value) -> bool:
    return isinstance(value, Symbol)


def _is_number(value: Value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_bytes(value: Value) -> bool:
    return isinstance(value, bytes)


def _is_list(value: Value) -> bool:
    return isinstance(value, tuple)


def _is_any(value: Value) -> bool:
    return True


def _concatenate(*strings: str) -> str:
    if sum(map(len, strings)) > LONGEST_STRING:
        raise BadMirrors("a string is too long")
    return "".join(strings)


def _same(first: Value, second: Value) -> bool:
    return type(first) is type(second) and bool(first == second)


def _member(item: Value, items: tuple[Value, ...]) -> Value:
    for position, other in enumerate(items):
        if _same(item, other):
            return items[position:]
    return False


def _chain(*lists: tuple[Value, ...]) -> tuple[Value, ...]:
    if sum(map(len, lists)) > LONGEST_LIST:
        raise BadMirrors("a list is too long")
    return tuple(item for each in lists for item in each)


_map = object()
_GLOBALS: dict[str, Value] = {
    "map": _map,
    "list": _Primitive((_is_any,), lambda *items: items, many=True),
    "cons": _Primitive((_is_any, _is_list), lambda item, items: (item, *items)),
    "append": _Primitive((_is_list,), _chain, many=True),
    "eq?": _Primitive((_is_any, _is_any), _same),
    "eqv?": _Primitive((_is_any, _is_any), _same),
    "equal?": _Primitive((_is_any, _is_any), _same),
    "memq": _Primitive((_is_any, _is_list), _member),
    "member": _Primitive((_is_any, _is_list), _member),
    "not": _Primitive((_is_any,), lambda value: value is False),
    "string-append": _Primitive((_is_string,), _concatenate, many=True),
    "symbol->string": _Primitive((_is_symbol,), str.__str__),
    "number->string": _Primitive((_is_number,), str),
    "string-downcase": _Primitive((_is_string,), lambda text: text.lower()),
    "bytevector->base16-string": _Primitive((_is_bytes,), lambda data: data.hex()),
    "bytevector->nix-base32-string": _Primitive((_is_bytes,), hashes.to_base32),
    "bytevector->base32-string": _Primitive(
        (_is_bytes,), lambda data: base64.b32encode(data).decode().rstrip("=").lower()
    ),
    "current-module": _Primitive((), lambda: False),
}
