"""Files of `torch.save`, read as data, with nothing of them executed.

`TorchFile` follows the pickle in the file by `PickleReader`. Tensors are copied from the raw numbers beside it when
they are asked for; so whatever else is in a file, such as the state of an optimiser, costs little.
"""

from __future__ import annotations

import io
import math
import mmap
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowdistill.plumbing.pickles import Function, Object, OpenReader

_DTYPES = {
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Float": torch.float32,
    "Double": torch.float64,
    "Bool": torch.bool,
    "Byte": torch.uint8,
    "Char": torch.int8,
    "Short": torch.int16,
    "Int": torch.int32,
    "Long": torch.int64,
}
_KINDS = {f"torch.{name}Storage": dtype for name, dtype in _DTYPES.items()}
_DENSE = "torch._utils._rebuild_tensor_v2"
_TENSORS = ("torch._utils._rebuild_", "torch._tensor._rebuild_")
_WRAPPED = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
_PLAIN_CLASSES = {"torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
_ZIP_HEADER = b"PK\3\4"
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_NAME_LENGTH = 500
_RESAVE = "if you trust it, load it and save its state dictionary again by torch.save(state_dict, path)"


@dataclass(frozen=True)
class _Storage:
    """The raw numbers of tensors: their kind, and what the file calls them."""

    kind: str
    key: str
    length: int

    @property
    def dtype(self) -> torch.dtype:
        if self.kind not in _KINDS:
            raise ValueError(f"it has numbers of the kind {self.kind}, which no weights have")
        return _KINDS[self.kind]


class _TorchReader(OpenReader):
    """Reads the pickles of `torch.save`."""

    def __init__(self) -> None:
        self.storages: dict[str, _Storage] = {}

    def persistent(self, reference: Any) -> _Storage:
        match reference:
            case ("storage", Function(kind), str(key), str(), int(length), *views) if length >= 0 and not any(views):
                return self.storages.setdefault(key, _Storage(kind, key, length))
        raise ValueError("it refers to something that is no storage of numbers")


def is_tensor(value: Any) -> bool:
    """Whether it is the record of a tensor, ordinary or not."""
    return isinstance(value, Object) and value.name.startswith(_TENSORS)


class TorchFile:
    """A file of `torch.save`, in the format of today or in that before PyTorch 1.6.

    Args:
        path: the file.

    Attributes:
        content: what was saved. Dictionaries, lists, tuples, numbers and strings are themselves; tensors and everything
            else are records, and a range stands for bytes.

    Raises:
        OSError: the file cannot be read.
        Exception: it is damaged or something else, or it wants to run a command.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._members: dict[str, zipfile.ZipInfo] = {}
        self._places: dict[str, range] = {}
        self.content = self._archived(path) if self._data[:4] == _ZIP_HEADER else self._old()

    def _archived(self, path: Path) -> Any:
        """The content of an archive, whose members ``data/KEY`` are the storages."""
        with zipfile.ZipFile(path) as archive:
            members = {member.filename: member for member in archive.infolist()}
        roots = [name.removesuffix("data.pkl") for name in members if name.split("/")[1:] == ["data.pkl"]]
        if len(roots) != 1 or f"{roots[0]}constants.pkl" in members:
            raise ValueError(f"it is an archive, but not of torch.save: {_RESAVE}")
        self._members = {name.removeprefix(roots[0]): v for name, v in members.items() if name.startswith(roots[0])}
        if "byteorder" in self._members and bytes(self._bytes(self._member("byteorder"))) != b"little":
            raise ValueError(f"its numbers are in the order of another machine: {_RESAVE}")
        return _TorchReader().read(io.BytesIO(self._bytes(self._member("data.pkl"))))

    def _member(self, name: str) -> range:
        """Where the bytes of a member lie."""
        if name not in self._members:
            raise ValueError(f"it lacks its part {name}")
        member = self._members[name]
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise ValueError(f"its part {name} is compressed or encrypted, which torch.save never does: {_RESAVE}")
        header = self._data[member.header_offset : member.header_offset + 30]
        start = member.header_offset + 30 + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
        place = range(start, start + member.file_size)
        if header[:4] != _ZIP_HEADER or place.stop > len(self._data):
            raise ValueError(f"its part {name} is damaged")
        if member.CRC not in (0, zlib.crc32(self._bytes(place))):  # 0 where torch was told to write none
            raise ValueError(f"its part {name} is damaged: the checksum is another one")
        return place

    def _old(self) -> Any:
        """The content of a file before PyTorch 1.6, where the storages follow the pickles."""
        reader = _TorchReader()
        header = [reader.read(self._data) for _ in range(3)] if self._data[:1] == b"\x80" else []
        if header[:2] != [_MAGIC, _PROTOCOL] or header[2].get("little_endian") is not True:
            raise ValueError(f"it is no file of torch.save: {_RESAVE}")
        content = reader.read(self._data)
        for key in reader.read(self._data):
            storage = reader.storages[key]
            length = int.from_bytes(self._data.read(8), "little")
            start = self._data.tell()
            self._places[key] = range(start, start + length * storage.dtype.itemsize)
            if length != storage.length or self._places[key].stop > len(self._data):
                raise ValueError("it is truncated or damaged")
            self._data.seek(self._places[key].stop)
        return content

    def _bytes(self, place: range) -> memoryview:
        return memoryview(self._data)[place.start : place.stop]

    def tensors(self, named: Mapping[Any, Any]) -> dict[str, Tensor]:
        """Copies of the tensors in a dictionary, by name; whatever else it holds is left out.

        Raises:
            Exception: a tensor is not an ordinary one, or is damaged, or a name cannot be shown.
        """
        found, size = {}, 0
        for key, value in named.items():
            if is_tensor(value):
                name = str(key)
                if len(name) > _NAME_LENGTH or not name.isprintable():
                    raise ValueError(f"it has a tensor whose name, of {len(name)} characters, cannot be one")
                found[name] = self._tensor(value, name)
                size += found[name].nbytes
                if size > len(self._data):
                    raise ValueError("its tensors are together larger than the file, since they share their numbers")
        return found

    def _tensor(self, value: Any, name: str) -> Tensor:
        match value:
            case Object(maker, (inner, *_)) if maker in _WRAPPED:
                return self._tensor(inner, name)
            case Object("torch._tensor._rebuild_from_type_v2", (Function(maker), Function(kind), tuple(arguments), _)):
                return self._tensor(Object(maker if kind in _PLAIN_CLASSES else kind, arguments), name)
            case Object(maker, (_Storage() as storage, int(first), tuple(size), tuple(stride), _, _, *metadata)):
                if maker == _DENSE and not any(metadata):
                    return self._dense(storage, first, size, stride, name)
        kind = getattr(value, "name", type(value).__name__)
        raise ValueError(f"its tensor {name} is not an ordinary one of numbers, but needs {kind}")

    def _dense(self, storage: _Storage, first: int, size: Any, stride: Any, name: str) -> Tensor:
        if not len(size) == len(stride) <= 8 or not all(type(n) is int and n >= 0 for n in (first, *size, *stride)):
            raise ValueError(f"its tensor {name} has an impossible shape")
        dtype = storage.dtype
        if storage.key not in self._places:
            self._places[storage.key] = self._member(f"data/{storage.key}")
        place = self._places[storage.key]
        if len(place) != storage.length * dtype.itemsize:
            raise ValueError(f"the numbers of its tensor {name} are not all in the file")
        last = first + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if math.prod(size) == 0:
            return torch.empty(size, dtype=dtype)
        if last >= storage.length or math.prod(size) > storage.length:
            raise ValueError(f"its tensor {name} has more numbers than the file")
        numbers = bytearray(self._bytes(place)[first * dtype.itemsize : (last + 1) * dtype.itemsize])
        return torch.frombuffer(numbers, dtype=dtype).as_strided(size, stride).contiguous()
