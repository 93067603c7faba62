"""Pickles read as data, with nothing of them executed.

A pickle is a program for a small stack machine, some of whose instructions import and call functions. Here a stack
machine follows it that neither imports nor calls: it makes records of the names and arguments. (`pickle.Unpickler` is
not safe even where it may import nothing: a deeply nested tuple as a key of a dictionary overflows its stack and kills
the process.)
"""

from __future__ import annotations

import pickletools
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import IO, Any, ClassVar

_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": frozenset}
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
_SINCE_MARK = {"TUPLE", "APPENDS", "SETITEMS", "ADDITEMS", "FROZENSET"}
_TAKES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2}
_TAKES |= {"STACK_GLOBAL": 2, "REDUCE": 2, "NEWOBJ": 2, "NEWOBJ_EX": 3, "BUILD": 1, "BINPERSID": 1}
_STORES, _LOADS = {"MEMOIZE", "BINPUT", "LONG_BINPUT"}, {"BINGET", "LONG_BINGET"}
_OTHERS = {"PROTO", "FRAME", "MARK", "STOP", "GLOBAL", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"}
INSTRUCTIONS = frozenset({*_CONSTANTS, *_EMPTY, *_VALUES, *_SINCE_MARK, *_TAKES, *_STORES, *_LOADS, *_OTHERS})
"""The instructions that `PickleReader` knows: those of the protocols 2 to 5, but for a few that nobody uses."""
_DICTS = {"collections.OrderedDict", "collections.defaultdict"}
_MODULES_OF_COMMANDS = {"os", "posix", "nt", "subprocess", "pty", "runpy", "importlib", "shutil", "socket", "sys"}
_COMMANDS = {f"{m}.{f}" for m in ("builtins", "__builtin__") for f in ("eval", "exec", "compile", "open", "__import__")}
_MAX_INSTRUCTIONS, _MAX_MARKS = 500_000, 100


@dataclass(frozen=True)
class Function:
    """Something the pickle wants to import."""

    name: str


@dataclass(eq=False)
class Object:
    """What the pickle wants to make by calling ``name``."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    """What is to be in it, if it is a dictionary of a class of its own."""


def as_dictionary(value: Any) -> dict[Any, Any]:
    """A dictionary, or the items of one of a class of its own; empty for all else."""
    items = value.items if isinstance(value, Object) else value
    return items if isinstance(items, dict) else {}


class PickleReader:
    """Follows pickles of one kind; a subclass says what else such pickles do.

    Bytes are returned as ranges of positions in the file, and sets of several elements as tuples of them.

    Raises:
        ValueError: the pickle is damaged, or does what such a pickle never does.
    """

    instructions: ClassVar[Set[str]] = INSTRUCTIONS
    """The instructions that such pickles use."""

    def read(self, data: IO[bytes] | Any) -> Any:
        """What the pickle at the current position of a file describes; the position is then that of its end."""
        stack: list[Any] = []
        outer_stacks: list[list[Any]] = []
        memo: dict[int, Any] = {}
        argument: Any
        for count, (opcode, argument, position) in enumerate(pickletools.genops(data)):
            code, items = opcode.name, []
            if code not in self.instructions:
                raise ValueError(f"it uses the pickle instruction {code}, at byte {position}, as no such file does")
            if count == _MAX_INSTRUCTIONS or len(outer_stacks) > _MAX_MARKS:
                raise ValueError("it has too many instructions, or nests them too deeply")
            if code in _SINCE_MARK:
                items, stack = stack, outer_stacks.pop()
            elif code in _TAKES:
                if len(stack) < _TAKES[code]:
                    raise ValueError(f"it is damaged: the instruction at byte {position} lacks its arguments")
                items = stack[-_TAKES[code] :]
                del stack[-_TAKES[code] :]
            if code in _CONSTANTS:
                stack.append(_CONSTANTS[code])
            elif code in _EMPTY:
                stack.append(_EMPTY[code]())
            elif code in _VALUES:
                stack.append(argument)
            elif "BYTE" in code:
                stack.append(range(data.tell() - len(argument), data.tell()))
            elif code == "MARK":
                outer_stacks.append(stack)
                stack = []
            elif code.startswith("TUPLE") or code == "FROZENSET":
                stack.append(tuple(items))
            elif code.startswith("APPEND"):
                self.append(stack[-1], items)
            elif code == "ADDITEMS":
                stack[-1] = tuple(items)
            elif code.startswith("SETITEM"):
                keys, values = [self.key(key) for key in items[::2]], items[1::2]
                self.set_items(stack[-1], dict(zip(keys, values, strict=True)))
            elif code in _STORES:
                memo[len(memo) if code == "MEMOIZE" else argument] = stack[-1]
            elif code in _LOADS:
                stack.append(memo[argument])
            elif code in ("GLOBAL", "STACK_GLOBAL"):
                name = argument.replace(" ", ".") if code == "GLOBAL" else ".".join(items)
                stack.append(self.imported(name))
            elif code in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
                stack.append(self.called(items[0], checked(items[1], tuple)))
            elif code == "BUILD":
                self.set_state(stack[-1], items[0])
            elif code == "BINPERSID":
                stack.append(self.persistent(items[0]))
            elif code == "FRAME" and argument > _size(data) - data.tell():
                raise ValueError("it is truncated")
        if len(stack) != 1 or outer_stacks:
            raise ValueError("it is damaged: its instructions do not add up to one value")
        return stack[0]

    def key(self, key: Any) -> Any:
        """A key of a dictionary."""
        return checked(key, str)

    def append(self, target: Any, items: Sequence[Any]) -> None:
        """Add elements to what must be a list."""
        checked(target, list).extend(items)

    def set_items(self, target: Any, items: dict[Any, Any]) -> None:
        """Add items to what must be a dictionary."""
        checked(target, dict).update(items)

    def imported(self, name: str) -> Function:
        """The record of a name that the pickle wants to import."""
        return Function(name)

    def called(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """The record of a call."""
        return Object(checked(function, Function).name, arguments)

    def set_state(self, target: Any, state: Any) -> None:
        """Keep the attributes that the pickle wants to give to an object."""
        checked(target, Object).state = state

    def persistent(self, reference: Any) -> Any:
        """What stands for something outside of the pickle."""
        return reference


class OpenReader(PickleReader):
    """Reads pickles where anything may stand beside what is looked for.

    What the pickle would import is in no list, since no name is ever looked up. Names that run commands are refused all
    the same: whoever has such a file should hear of it.
    """

    def key(self, key: Any) -> Any:
        """Nothing whose hash looks deep into it."""
        for part in key if type(key) is tuple else (key,):
            if not isinstance(part, (str, int, float, range, Function, Object, type(None))):
                raise ValueError(f"it has a {type(part).__name__} in the key of a dictionary")
        return key

    def append(self, target: Any, items: Any) -> None:
        """Add elements to a list; one of a class of its own is left as it is."""
        if not isinstance(target, Object):
            super().append(target, items)

    def set_items(self, target: Any, items: dict[Any, Any]) -> None:
        """Add items to a dictionary, or to one of a class of its own."""
        if isinstance(target, Object):
            target.items.update(items)
        else:
            super().set_items(target, items)

    def imported(self, name: str) -> Function:
        """The record of a name, which may not be that of a command."""
        if name.split(".")[0] in _MODULES_OF_COMMANDS or name in _COMMANDS:
            raise ValueError(f"it wants to run {name}, as no checkpoint does")
        return super().imported(name)

    def called(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """A dictionary, empty as yet, or the record of any other call."""
        name = function.name if isinstance(function, Object) else checked(function, Function).name
        return {} if name in _DICTS else Object(name, arguments)

    def set_state(self, target: Any, state: Any) -> None:
        """Keep the attributes of an object; nobody needs those of a dictionary."""
        if isinstance(target, Object):
            target.state = state


def checked(value: Any, kind: type) -> Any:
    """The value, which must be of just this type."""
    if type(value) is not kind:
        wrong, right = (t.__name__.lower() for t in (type(value), kind))
        raise ValueError(f"it has a value of type {wrong} where such a file has one of type {right}")
    return value


def _size(data: IO[bytes] | Any) -> int:
    position = data.tell()
    data.seek(0, 2)
    size: int = data.tell()
    data.seek(position)
    return size
