"""Files of images in a folder or an archive: the one reader of references and of `ImageFolder`."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from PIL import Image

from flowdistill.plumbing.errors import DataError, in_one_line
from flowdistill.plumbing.files import file_parts

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
"""The ends of the names of image files, in small letters."""
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # none of which Pillow runs a program for
_LIST, _CLASS = "dataset.json", ".cls"
_SHARD = re.compile(r"(.*[-_.])?\d+")  # a name of one of several tar files that is no class
_MOST_BYTES = 1 << 28  # of one file in an archive


class ImageFiles:
    """The image files in a folder or in an archive, however deep, in the order of their names.

    An archive is a ``.zip`` or a ``.tar`` file. A folder of ``.tar`` files, without images of its own, is read as if
    each were a folder. Of the files in archives only those that are asked for are read.

    Hidden files and files that do not end in one of `SUFFIXES` are left out, and a warning counts them. Links to
    folders are followed. Of an animation the first picture is read. As ADM, torch-fidelity and clean-fid read images,
    transparency is dropped and not blended, and the orientation in a camera's EXIF data is not applied.

    Args:
        path: the folder or the archive.

    Raises:
        DataError: it cannot be read, or holds no images.

    Examples:
        >>> files = ImageFiles(Path("imagenet/train"))  # doctest: +SKIP
        >>> len(files), files.names[0], files.labels[0]  # doctest: +SKIP
        (1281167, 'n01440764/n01440764_10026.JPEG', 0)

    Attributes:
        names: the names of the files, relative to the path, with slashes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive: zipfile.ZipFile | None = None
        self._members: dict[str, tuple[Path, int, int]] = {}  # of tar files: where a file begins, and its size
        self._tars = False  # whether there are several
        try:
            if path.is_dir():
                found = _below(path)
                tars = [name for name in found if _kind(name) == ".tar"]
                if tars and not any(_kind(name) in SUFFIXES for name in found):
                    self._members, self._tars = _members(path, tars), True
                    found = list(self._members)
            elif path.suffix.lower() == ".tar":
                self._members = _members(path.parent, [path.name], folders=False)
                found = list(self._members)
            else:
                self._archive = zipfile.ZipFile(path)
                found = self._archive.namelist()
        except Exception as error:  # of a damaged archive, many
            raise DataError(f"{path} cannot be read: {in_one_line(error)}") from None
        files = sorted(name for name in found if not name.endswith("/"))
        kinds = {name: _kind(name) for name in files}
        self._classes = sorted(name for name in self._members if kinds[name] == _CLASS)
        self.names = [name for name, kind in kinds.items() if kind in SUFFIXES]
        self._listed = _LIST in kinds
        ours = {*SUFFIXES, *([_CLASS] if self._members else [])}
        others = Counter(kind for name, kind in kinds.items() if kind not in ours and name != _LIST)
        left_out = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))
        if not self.names:
            beside = f", only others ({left_out})" if left_out else ""
            raise DataError(f"{path} holds no images{beside}: their names end in {', '.join(sorted(SUFFIXES))}")
        if others:
            count = others.total()
            warnings.warn(
                f"{path}: {len(self.names)} images are read, and {count} other files are left out ({left_out})",
                RuntimeWarning,
                stacklevel=3,
            )

    def __len__(self) -> int:
        """The number of images."""
        return len(self.names)

    def read(self, number: int, channels: int) -> Image.Image:
        """An image of bytes: grey for 1 channel, RGB for 3. Pixels of 16 bits are scaled to 8.

        Raises:
            DataError: the file is damaged, or no image.
        """
        name = self.names[number]
        try:
            with self._open(name) as file, Image.open(file, formats=_FORMATS) as image:
                image.load()
                image.info.pop("transparency", None)
                return _of_bytes(image).convert("L" if channels == 1 else "RGB")
        except Exception as error:  # of a damaged image, anything
            raise DataError(f"{self.path / name} is not a whole image: {in_one_line(error)}") from None

    @cached_property
    def listed_labels(self) -> list[int] | None:
        """The class of each image, from 0 on, as files say it; None where they do not.

        Such files are the ``dataset.json`` of EDM's tool and, in tar files, one that ends in ``.cls`` beside each
        image, as WebDataset has it.

        Raises:
            DataError: they are damaged, or an image lacks a class.
        """
        if self._classes:
            return [self._class_beside(name) for name in self.names]
        if not self._listed:
            return None
        try:
            with self._open(_LIST) as file:
                pairs = json.load(file)["labels"]
            table: dict[str, Any] = {} if pairs is None else dict(pairs)
            labels = [table[name] for name in self.names] if table else None
        except KeyError as error:
            raise DataError(f"{self.path / _LIST} lacks {in_one_line(error)}") from None
        except Exception as error:
            raise DataError(f"{self.path / _LIST} is no list of labels: {in_one_line(error)}") from None
        if labels is not None and not all(type(label) is int and 0 <= label < 10**6 for label in labels):
            raise DataError(f"{self.path / _LIST} has labels that are not whole numbers from 0 on")
        return labels

    @cached_property
    def labels(self) -> list[int] | None:
        """The class of each image: as files list them, or else the subfolders in the order of their names.

        A tar file in a folder of them is a subfolder. None where ``dataset.json`` has no classes, where no image is in
        a subfolder, and where the tar files of a folder are numbered, as in ``train-00000.tar``.

        Raises:
            DataError: images lie beside subfolders with images, a subfolder has none, or an image lacks a class that
                others have.
        """
        if self._listed or self._classes:
            return self.listed_labels
        tops = [name.split("/")[0] if "/" in name else "" for name in self.names]
        classes = sorted(set(tops))
        if classes == [""] or (self._tars and all(_SHARD.fullmatch(top) for top in classes)):
            return None
        if not classes[0]:
            raise DataError(f"{self.path} holds images beside folders of classes, such as {classes[1]}: move them")
        if self._archive is None and not self._members:
            folders = {entry.name for entry in os.scandir(self.path) if entry.is_dir() and entry.name[0] != "."}
            if empty := sorted(folders - set(classes)):
                raise DataError(f"{self.path} holds folders of classes without images, such as {empty[0]}: remove them")
        numbers = {name: number for number, name in enumerate(classes)}
        return [numbers[top] for top in tops]

    def _class_beside(self, name: str) -> int:
        """The class of an image in a tar file, by the file beside it."""
        beside = f"{name[: -len(PurePosixPath(name).suffix)]}{_CLASS}"
        try:
            with self._open(beside) as file:
                label = int(file.read(20))
        except (KeyError, ValueError):
            raise DataError(f"{self.path / beside} is missing, or holds no class") from None
        if not 0 <= label < 10**6:
            raise DataError(f"{self.path / beside} holds {label}: classes are whole numbers from 0 on")
        return label

    def parts(self) -> Iterator[bytes]:
        """The bytes of all that is read, for a fingerprint."""
        for path in sorted({path for path, _, _ in self._members.values()}):
            yield from file_parts(path)
        if self._members:
            return
        if self._archive is not None:
            yield from file_parts(self.path)
            return
        for name in [*self.names, *([_LIST] if self._listed else [])]:
            path = self.path / name
            try:
                yield path.stat().st_size.to_bytes(8, "big")
                yield from file_parts(path)
            except OSError as error:
                raise DataError(f"{path} cannot be read: {in_one_line(error)}") from None

    def _open(self, name: str) -> IO[bytes]:
        if self._members:
            path, start, size = self._members[name]
            if size > _MOST_BYTES:
                raise ValueError("it is too large for an image")
            with path.open("rb") as file:
                file.seek(start)
                return io.BytesIO(file.read(size))
        if self._archive is None:
            return (self.path / name).open("rb")
        if self._archive.getinfo(name).file_size > _MOST_BYTES:
            raise ValueError("it is too large for an image")
        return io.BytesIO(self._archive.read(name))


def _kind(name: str) -> str:
    """The end of a file's name in small letters, or in words what else it is."""
    path = PurePosixPath(name)
    if any(part.startswith(".") for part in path.parts):
        return "hidden"
    return path.suffix.lower() or "without an ending"


def _below(folder: Path) -> list[str]:
    """The files below a folder, relative to it. Links to what is there anyway are not followed."""
    found, seen, own = [], set(), os.path.realpath(folder)
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        inside = os.path.relpath(place, folder).replace(os.sep, "/")
        found += names if inside == "." else [f"{inside}/{name}" for name in names]
        for name in [name for name in folders if os.path.islink(os.path.join(place, name))]:
            target = os.path.realpath(os.path.join(place, name))
            if target in seen or f"{target}{os.sep}".startswith(f"{own}{os.sep}"):
                folders.remove(name)
            seen.add(target)
    return found


def _members(folder: Path, tars: list[str], folders: bool = True) -> dict[str, tuple[Path, int, int]]:
    """The files in tar files by their names, to which the name of the tar file is prefixed as that of a folder."""
    found = {}
    for tar in sorted(tars):
        prefix = f"{tar[: -len('.tar')]}/" if folders else ""
        with tarfile.open(folder / tar, "r:") as archive:
            for member in archive:
                name = prefix + member.name.removeprefix("./")
                if member.isreg() and not member.issparse():
                    found[name] = (folder / tar, member.offset_data, member.size)
                elif member.islnk() and (linked := prefix + member.linkname.removeprefix("./")) in found:
                    found[name] = found[linked]
    return found


def _refuse(error: OSError) -> None:
    raise error


def _of_bytes(image: Image.Image) -> Image.Image:
    """An image of 16 bits as one of 8, by the scale of white; any other one as it is."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are numbers of 32 bits, and nothing says which is white")
    return image
