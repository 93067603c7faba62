"""Image files as others write them: what is read, as what, what is left out, and what is refused."""

import io
import json
import os
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from flowdistill import DataError
from flowdistill.data import ImageFolder
from flowdistill.data.image_files import ImageFiles
from flowdistill.data.image_folder import centre_crop
from flowdistill.plumbing.dry import without_files

GREY = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
RAMP = np.stack([GREY, GREY.T, GREY[::-1]], -1)


def png_bomb():
    """A few bytes that say they are 30 000 by 30 000 pixels."""
    data = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(data, "PNG")
    return data.getvalue()


def saved(folder, name, image, **options):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def read(folder, channels, number=0):
    return np.asarray(ImageFiles(folder).read(number, channels))


def palette():
    image = Image.fromarray(GREY // 4, "P")
    image.putpalette([v for i in range(64) for v in (i, 2 * i, 3 * i)])
    return image


COLOURS = np.stack([GREY // 4, GREY // 2, GREY // 4 * 3], -1)
TRANSPARENT = np.concatenate([RAMP, np.zeros((8, 8, 1), np.uint8)], -1)
# The file, the image in it, and the bytes that are right.
KINDS = {
    "16 bits": ("a.png", Image.fromarray(GREY.astype(np.uint16) * 257), GREY),
    "16 bits, others": ("a.png", Image.fromarray(GREY.astype(np.uint16) * 257 + 128), GREY),
    "16 bits of a scan": ("a.tiff", Image.fromarray(GREY.astype(np.uint16) * 257), GREY),
    "16 bits, PGM": ("a.pgm", Image.fromarray(GREY.astype(np.uint16) * 257), GREY),
    "grey": ("a.PNG", Image.fromarray(GREY), GREY),
    "webp": ("a.webp", Image.fromarray(RAMP), RAMP),
    "bmp": ("a.bmp", Image.fromarray(RAMP), RAMP),
    "palette": ("a.png", palette(), COLOURS),
    "palette with transparent colours": ("a.png", palette(), COLOURS),
    "alpha": ("a.png", Image.fromarray(TRANSPARENT), RAMP),
    "grey with alpha": ("a.png", Image.fromarray(np.stack([GREY, 0 * GREY], -1), "LA"), GREY),
    "1 bit": ("a.png", Image.fromarray(GREY > 100), 255 * (GREY > 100)),
    "a name that lies": ("a.jpg", Image.fromarray(RAMP), RAMP),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_of_every_kind(kind, tmp_path):
    name, image, wanted = KINDS[kind]
    options = {"webp": {"lossless": True}, "palette with transparent colours": {"transparency": bytes(64)}}
    saved(tmp_path, name, image, **options.get(kind, {}), **({"format": "PNG"} if kind == "a name that lies" else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = read(tmp_path, 3)
        assert read(tmp_path, 1).shape == (8, 8)
    np.testing.assert_array_equal(pixels, wanted if wanted.ndim == 3 else np.stack(3 * [wanted], -1))


def test_printed_colours_animations_and_cameras(tmp_path):
    """As ADM, torch-fidelity and clean-fid do: Pillow's own conversion, the first picture, as it is stored."""
    ink = Image.fromarray(np.full((8, 8, 4), (0, 128, 255, 0), np.uint8), "CMYK")
    saved(tmp_path / "ink", "a.jpg", ink, quality=100)
    assert np.abs(read(tmp_path / "ink", 3).astype(int) - (255, 127, 0)).max() < 3
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for suffix, options in (("gif", {}), ("webp", {"lossless": True}), ("png", {})):
        saved(tmp_path / suffix, f"a.{suffix}", pictures[0], save_all=True, append_images=pictures[1:], **options)
        np.testing.assert_array_equal(read(tmp_path / suffix, 3), np.asarray(pictures[0]))
    turned = Image.Exif()
    turned[0x0112] = 6
    saved(tmp_path / "camera", "a.png", Image.fromarray(RAMP), exif=turned)
    np.testing.assert_array_equal(read(tmp_path / "camera", 3), RAMP)


def test_all_images_are_found_and_what_is_left_out_is_counted(tmp_path):
    names = ["a.png", "b/c/d.JPEG", "b/e.webp", "f.Png"]
    for name in names:
        saved(tmp_path / "x", name, Image.fromarray(RAMP))
    elsewhere = saved(tmp_path / "elsewhere", "g.png", Image.fromarray(RAMP)).parent
    (tmp_path / "x" / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(tmp_path / "x")
    (elsewhere / "again").symlink_to(elsewhere)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ImageFiles(tmp_path / "x").names == sorted([*names, "link/g.png"])
    for name in ("readme.txt", "notes.TXT", ".hidden.png", "b/.cache/h.png", "list"):
        (tmp_path / "x" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "x" / name).write_text("")
    match = r"5 images are read, and 5 other files are left out \(2 .txt, 2 hidden, 1 without an ending\)"
    with pytest.warns(RuntimeWarning, match=match.replace("2 .txt, 2 hidden", "2 .*, 2 .*")):
        assert len(ImageFiles(tmp_path / "x")) == 5


def archive(path, members):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def encoded(pixels):
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def test_an_archive_of_edms_tool(tmp_path):
    labels = [["00000/img00000001.png", 3], ["00000/img00000000.png", 7]]
    members = {f"00000/img0000000{i}.png": encoded(RAMP + i) for i in range(2)}
    path = archive(tmp_path / "x.zip", {**members, "dataset.json": json.dumps({"labels": labels})})
    files = ImageFiles(path)
    assert files.labels == files.listed_labels == [7, 3]
    np.testing.assert_array_equal(np.asarray(files.read(1, 3)), RAMP + 1)
    assert ImageFolder(path, 8).num_classes == 8
    plain = ImageFiles(archive(tmp_path / "y.zip", {**members, "dataset.json": '{"labels": null}'}))
    assert plain.labels is None  # though there is a folder
    by_folder = ImageFiles(archive(tmp_path / "z.zip", {"cat/a.png": encoded(RAMP), "dog/a.png": encoded(RAMP)}))
    assert by_folder.labels == [0, 1]
    assert by_folder.listed_labels is None


LISTS = {
    "no JSON": ("{", "no list of labels"),
    "an image is missing": ('{"labels": [["b.png", 1]]}', "lacks 'a.png'"),
    "words": ('{"labels": [["a.png", "cat"]]}', "whole numbers"),
    "vectors": ('{"labels": [["a.png", [0, 1]]]}', "whole numbers"),
    "negative": ('{"labels": [["a.png", -1]]}', "whole numbers"),
    "numbers alone": ('{"labels": [1, 2]}', "no list of labels"),
    "nested": ("[" * 100_000, "no list of labels"),
    "another kind": ("[]", "no list of labels"),
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_of_labels_that_are_none(kind, tmp_path):
    text, match = LISTS[kind]
    saved(tmp_path, "a.png", Image.fromarray(GREY))
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(DataError, match=match):
        ImageFolder(tmp_path, 8)


BROKEN = {
    "empty": b"",
    "text": b"no image at all",
    "half": encoded(RAMP)[:-40],
    "flipped": encoded(RAMP)[:50] + b"\xff\xff\xff" + encoded(RAMP)[53:],
    "bomb": png_bomb(),
    "a program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_images_are_named(kind, tmp_path):
    (tmp_path / "a.png").write_bytes(BROKEN[kind])
    path = archive(tmp_path / "x.zip", {"a.png": BROKEN[kind]})
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "folder" / "a.png")
    for source in (tmp_path / "folder", path):
        with pytest.raises(DataError, match=r"a\.png is not a whole image: \w+"):
            read(source, 3)


def test_numbers_of_32_bits_have_no_white(tmp_path):
    saved(tmp_path, "a.tiff", Image.fromarray(GREY.astype(np.float32)))
    with pytest.raises(DataError, match="which is white"):
        read(tmp_path, 1)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        ImageFiles(tmp_path / "nowhere")
    (tmp_path / "x.zip").write_bytes(b"PK\3\4 and no more")
    with pytest.raises(DataError, match="cannot be read"):
        ImageFiles(tmp_path / "x.zip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no images: .*\.webp"):
        ImageFiles(tmp_path / "empty")
    (tmp_path / "empty" / "x.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds no images, only others \(1 \.npy\)"):
        ImageFiles(tmp_path / "empty")


@pytest.fixture
def classes(tmp_path):
    """5 images of class 0, grey 40, and 3 of class 1, grey 200, one of them deeper."""
    for name, grey in [*((f"n01/{i}.png", 40) for i in range(5)), ("n02/a.png", 200), ("n02/b/c.jpg", 200)]:
        saved(tmp_path, name, Image.new("L", (20, 30), grey))
    saved(tmp_path, "n02/d.bmp", Image.new("RGB", (50, 30), (200, 200, 200)))
    return tmp_path


def test_subfolders_are_classes(classes):
    data = ImageFolder(classes, 8)
    assert data.sample_shape == (3, 8, 8)
    assert data.num_classes == 2
    images, labels = data.sample(400, torch.Generator().manual_seed(0))
    assert images.shape == (400, 3, 8, 8)
    assert images.dtype == torch.float32
    grey = torch.where(labels == 0, 40, 200)[:, None, None, None] / 127.5 - 1
    torch.testing.assert_close(images, grey.expand_as(images), atol=2.1 / 127.5, rtol=0)  # JPEG's own error
    assert 0.5 < (labels == 0).float().mean() < 0.75
    again, _ = ImageFolder(classes, 8).sample(400, torch.Generator().manual_seed(0))
    assert torch.equal(images, again)
    assert ImageFolder(classes, 8, channels=1).sample(2, torch.Generator())[0].shape == (2, 1, 8, 8)


def test_a_flat_folder_has_no_classes(classes):
    data = ImageFolder(classes / "n01", 8)
    assert data.num_classes is None
    assert data.sample(3, torch.Generator())[1] is None


def test_classes_that_cannot_be_told(classes):
    saved(classes, "z.png", Image.fromarray(GREY))
    with pytest.raises(DataError, match="beside folders of classes, such as n01"):
        ImageFolder(classes, 8)
    (classes / "z.png").unlink()
    (classes / "n00").mkdir()
    (classes / ".ipynb_checkpoints").mkdir()
    with pytest.raises(DataError, match="folders of classes without images, such as n00"):
        ImageFolder(classes, 8)
    with pytest.raises(DataError, match="1 or 3 channels"):
        ImageFolder(classes, 8, channels=4)


def test_the_square_in_the_middle_as_adm_scales_it():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 52, 3), dtype=np.uint8)
    means = pixels.reshape(8, 4, 13, 4, 3).mean((1, 3))  # halved twice; then 8 rows are just enough
    found = np.asarray(centre_crop(Image.fromarray(pixels), 8)).astype(float)
    np.testing.assert_allclose(found, means[:, 2:10], atol=2.01)  # of four roundings
    small = Image.fromarray(pixels[:12, :12])
    np.testing.assert_array_equal(
        np.asarray(centre_crop(small, 8)), np.asarray(small.resize((8, 8), Image.Resampling.BICUBIC))
    )
    assert centre_crop(Image.new("L", (5, 3)), 16).size == (16, 16)  # larger than it was


def test_a_plan_reads_no_image(classes, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *arguments, **settings: pytest.fail("an image was read"))
    with without_files():
        assert ImageFolder(classes, 8).num_classes == 2
        absent = ImageFolder(tmp_path / "absent", 8)
    assert absent.sample_shape == (3, 8, 8)
    assert absent.num_classes is None


def test_an_unreadable_subfolder_is_not_left_out_silently(classes, monkeypatch):
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("n02"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match="Permission denied"):
        ImageFiles(classes)


# Tar files.


def packed(path, files):
    """A tar file of files by their names; images, or bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            data = io.BytesIO()
            if isinstance(content, bytes):
                data.write(content)
            else:
                Image.fromarray(content).save(data, "PNG")
            entry = tarfile.TarInfo(name)
            entry.size = data.tell()
            data.seek(0)
            archive.addfile(entry, data)
    return path


def test_a_tar_file_for_each_class(tmp_path):
    """As ImageNet is published."""
    packed(tmp_path / "n2.tar", {"b.PNG": RAMP, "a.png": GREY})
    packed(tmp_path / "n1.tar", {"./c.png": GREY[::-1]})
    files = ImageFiles(tmp_path)
    assert files.names == ["n1/c.png", "n2/a.png", "n2/b.PNG"]
    assert files.labels == [0, 1, 1]
    np.testing.assert_array_equal(files.read(0, 1), GREY[::-1])
    np.testing.assert_array_equal(files.read(2, 3), RAMP)
    before = b"".join(files.parts())
    packed(tmp_path / "n1.tar", {"c.png": GREY})
    assert b"".join(ImageFiles(tmp_path).parts()) != before


def test_shards_of_webdataset(tmp_path):
    packed(tmp_path / "x" / "00001.tar", {"2.png": GREY, "2.cls": b"1\n", "3.png": GREY, "3.cls": b"7"})
    packed(tmp_path / "x" / "00000.tar", {"0.cls": b"4", "0.png": RAMP, "0.json": b"{}"})
    with pytest.warns(RuntimeWarning, match=r"3 images are read, and 1 other files are left out \(1 \.json\)"):
        files = ImageFiles(tmp_path / "x")
    assert files.labels == [4, 1, 7]
    for name, content in {"missing": {}, "a word": {"0.cls": b"cat"}, "negative": {"0.cls": b"-1"}}.items():
        packed(tmp_path / name / "00000.tar", {"0.png": GREY, **content, "1.png": GREY, "1.cls": b"1"})
        with pytest.raises(DataError, match=r"0\.cls"):
            _ = ImageFiles(tmp_path / name).labels


def test_tar_files_without_classes_and_one_alone(tmp_path):
    for number in range(2):
        packed(tmp_path / "shards" / f"{number:05d}.tar", {f"{number}.png": GREY})
    assert ImageFiles(tmp_path / "shards").labels is None
    for name in ("train-00000", "train-00001"):
        packed(tmp_path / "named" / f"{name}.tar", {"a.png": GREY})
    assert ImageFiles(tmp_path / "named").labels is None
    numbered = ImageFiles(packed(tmp_path / "numbered.tar", {"0/a.png": GREY, "1/b.png": RAMP}))
    assert numbered.labels == [0, 1]
    assert ImageFiles(packed(tmp_path / "flat.tar", {"a.png": GREY})).labels is None
    deep = ImageFiles(packed(tmp_path / "deep.tar", {"bees/a.png": GREY, "ants/b.png": RAMP}))
    assert (deep.names, deep.labels) == (["ants/b.png", "bees/a.png"], [0, 1])
    np.testing.assert_array_equal(deep.read(0, 3), RAMP)


def test_tar_files_that_are_damaged_or_hostile(tmp_path):
    whole = packed(tmp_path / "a.tar", {"a.png": RAMP, "b.png": RAMP}).read_bytes()
    for place in (5, 100, 150, 500):
        (tmp_path / "b.tar").write_bytes(whole[:place] + b"\xff\xfe\xfd" + whole[place + 3 :])
        with pytest.raises(DataError):
            ImageFiles(tmp_path / "b.tar").read(0, 3)
    (tmp_path / "b.tar").write_bytes(whole[:700])
    with pytest.raises(DataError):
        ImageFiles(tmp_path / "b.tar").read(0, 3)
    (tmp_path / "b.tar").write_bytes(b"")
    with pytest.raises(DataError):
        ImageFiles(tmp_path / "b.tar")
    # A link is no image, and what it leads to is not read.
    with tarfile.open(tmp_path / "c.tar", "w") as archive:
        entry = tarfile.TarInfo("secret.png")
        entry.type, entry.linkname = tarfile.SYMTYPE, str(saved(tmp_path, "outside.png", Image.fromarray(GREY)))
        archive.addfile(entry)
    with pytest.raises(DataError, match="holds no images"):
        ImageFiles(tmp_path / "c.tar")
    with tarfile.open(packed(tmp_path / "d.tar", {"a.png": RAMP}), "a") as archive:
        entry = tarfile.TarInfo("b.png")
        entry.type, entry.linkname = tarfile.LNKTYPE, "a.png"  # another name of a file in the archive
        archive.addfile(entry)
    linked = ImageFiles(tmp_path / "d.tar")
    assert linked.names == ["a.png", "b.png"]
    np.testing.assert_array_equal(linked.read(1, 3), RAMP)
    files = ImageFiles(packed(tmp_path / "bomb.tar", {"a.png": png_bomb()}))
    with pytest.raises(DataError, match="is not a whole image"):
        files.read(0, 3)


def test_tar_files_beside_images_are_left_out(tmp_path):
    packed(tmp_path / "x" / "a.tar", {"a.png": GREY})
    saved(tmp_path / "x", "b.png", Image.fromarray(GREY))
    with pytest.warns(RuntimeWarning, match=r"1 other files are left out \(1 \.tar\)"):
        assert ImageFiles(tmp_path / "x").names == ["b.png"]


def test_a_data_set_of_tar_files(tmp_path):
    packed(tmp_path / "x" / "n1.tar", {"a.png": RAMP})
    packed(tmp_path / "x" / "n2.tar", {"a.png": RAMP[::-1].copy()})
    images, labels = ImageFolder(tmp_path / "x", 8).sample(20, torch.Generator().manual_seed(0))
    one = torch.from_numpy(RAMP).permute(2, 0, 1) / 127.5 - 1
    wanted = torch.where(labels.reshape(-1, 1, 1, 1) == 0, one, one.flip(1))
    torch.testing.assert_close(images, wanted)
