"What does not fit in the notebook's example cells: subprocesses, broken files, archives, caching, many processes"
import base64
import gzip
import io
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

import symbreak.cache
from symbreak.cache import import_torchvision
from symbreak.data import DataError, Dataset, Loader, load


def python(code, **env):
    "Run `code` in a fresh interpreter"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env)


def write_folder(root, test="test", classes=("cat", "dog"), size=(8, 8)):
    rng = np.random.default_rng(0)
    for split, n in (("train", 3), (test, 2)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                image = Image.fromarray(rng.integers(256, size=(*size, 3), dtype=np.uint8))
                image.save(root / split / name / f"{i}.png")
    return root


def folder(root, cache, **kwargs): return load(f"folder:{root}", cache=cache, progress=False, **kwargs)


def refuses(match, root, cache):
    with pytest.raises(DataError, match=match) as e: folder(root, cache)
    assert "\n" not in str(e.value)
    assert all(p.suffix == ".lock" for p in cache.glob("*"))


# torchvision

IMPORT = "from symbreak.cache import import_torchvision as tv; "

def test_torchvision_imports_whatever_its_build():
    plain = python("import torchvision")
    cured = python(IMPORT + "print(tv().datasets.CIFAR10.tgz_md5, tv() is tv())")
    assert cured.stdout.split() == ["c58f30108f718f92721af3b95e74349a", "True"], cured.stderr
    if plain.returncode: assert "torchvision::nms" in plain.stderr


def test_torchvision_after_a_failed_import():
    code = "\n".join(["try: import torchvision", "except RuntimeError: pass", IMPORT + "tv().transforms"])
    assert python(code).returncode == 0


def stand_in(tmp_path, body):
    (tmp_path / "torchvision.py").write_text(body)
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}


def test_working_torchvision_is_left_alone(tmp_path):
    code = IMPORT + "tv(); import torch; print(hasattr(torch.ops.torchvision, 'nms'))"
    assert python(code, **stand_in(tmp_path, "")).stdout.strip() == "False"


def test_other_import_failures_pass_through(tmp_path):
    run = python(IMPORT + "tv()", **stand_in(tmp_path, "raise RuntimeError('other')"))
    assert "RuntimeError: other" in run.stderr


# archives

def cifar_archive(folder, name="cifar-10-python.tar.gz"):
    "A tiny archive of CIFAR-10's layout, and the checksums that torchvision would have to know"
    rng, sums, root = np.random.default_rng(0), {}, "cifar-10-batches-py"
    (folder / root).mkdir(parents=True)
    files = {f"data_batch_{i}": 4 for i in range(1, 6)} | {"test_batch": 10}
    content = {file: dict(data=rng.integers(256, size=(n, 3072), dtype=np.uint8), labels=[i % 2 for i in range(n)])
               for file, n in files.items()} | {"batches.meta": dict(label_names=["cat", "dog"])}
    for file, value in content.items():
        raw = pickle.dumps(value)
        (folder / root / file).write_bytes(raw)
        sums[file] = md5(raw).hexdigest()
    with tarfile.open(folder / name, "w:gz") as tar: tar.add(folder / root, root)
    return sums, md5((folder / name).read_bytes()).hexdigest(), content


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    "A mirror folder, and a torchvision that expects what it holds"
    mirror = tmp_path / "mirror"
    sums, tgz_md5, content = cifar_archive(mirror)
    cls = import_torchvision().datasets.CIFAR10
    monkeypatch.setattr(cls, "tgz_md5", tgz_md5)
    monkeypatch.setattr(cls, "train_list", [[f, sums[f]] for f in sums if f.startswith("data")])
    monkeypatch.setattr(cls, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(cls, "meta", dict(filename="batches.meta", key="label_names", md5=sums["batches.meta"]))
    monkeypatch.delenv("SYMBREAK_MIRROR", raising=False)
    return mirror, content


@pytest.mark.parametrize("how", ["argument", "environment", "one file"])
def test_cifar_from_a_mirror(cifar, tmp_path, monkeypatch, how):
    mirror, content = cifar
    uri = mirror.as_uri() + ("/cifar-10-python.tar.gz" if how == "one file" else "")
    if how == "environment": monkeypatch.setenv("SYMBREAK_MIRROR", uri)
    cache = tmp_path / "cache"
    a = load("cifar10", cache=cache, mirror=None if how == "environment" else uri, progress=False)
    assert torch.equal(a.test_images, torch.from_numpy(content["test_batch"]["data"]).view(-1, 3, 32, 32))
    assert a.test_labels.dtype == torch.int64 and a.test_labels.tolist() == [0, 1] * 5
    assert (a.classes, a.label, a.augment, a.pad) == (("cat", "dog"), "CIFAR-10", "crop_flip", 4)
    assert a.mean == (125.3 / 255, 123.0 / 255, 113.9 / 255) and a.std == (63.0 / 255, 62.1 / 255, 66.7 / 255)
    assert sorted(p.name for p in cache.iterdir()) == ["cifar10.lock", "cifar10.pt"]
    assert load("cifar10", cache=cache, mirror="file:///nowhere").digest == a.digest  # the cache needs no network


def test_archive_by_hand(cifar, tmp_path):
    mirror, _ = cifar
    by_hand = mirror / "cifar-10-python.tar.gz"
    assert len(load("cifar10", cache=mirror, mirror="file:///nowhere", progress=False).train_labels) == 20
    (mirror / "cifar10.pt").unlink()
    by_hand.write_bytes(by_hand.read_bytes()[:100])
    with pytest.raises(DataError, match="cifar-10-python.tar.gz: corrupt archive; delete it, or replace it") as e:
        load("cifar10", cache=mirror)
    assert "\n" not in str(e.value) and by_hand.exists() and not (mirror / "cifar10.pt").exists()


def test_corrupt_download_leaves_nothing(cifar, tmp_path):
    mirror, _ = cifar
    (mirror / "cifar-10-python.tar.gz").write_bytes(b"half")
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match="wrong checksum.*put the file at .*cache/cifar-10-python.tar.gz"):
        load("cifar10", cache=cache, mirror=mirror.as_uri(), progress=False)
    assert [p.name for p in cache.iterdir()] == ["cifar10.lock"]


@pytest.mark.parametrize("source", ["mnist", "cifar10", "cifar100"])
@pytest.mark.parametrize("mirror", ["http://127.0.0.1:9/", "no-scheme", "file:///nowhere"])
def test_offline(tmp_path, source, mirror):
    with pytest.raises(DataError, match="cannot download .*put the file at .*md5.*SYMBREAK_MIRROR.*'digits'") as e:
        load(source, cache=tmp_path, mirror=mirror, progress=False)
    assert "\n" not in str(e.value) and [p.name for p in tmp_path.iterdir()] == [f"{source}.lock"]


def test_mnist(tmp_path, monkeypatch):
    rng, mirror, resources, images = np.random.default_rng(0), tmp_path / "mirror", [], {}
    mirror.mkdir()
    for part, n in (("train", 30), ("t10k", 20)):
        images[part] = rng.integers(256, size=(n, 28, 28), dtype=np.uint8)
        for kind, raw in (("images-idx3", struct.pack(">4i", 2051, n, 28, 28) + images[part].tobytes()),
                          ("labels-idx1", struct.pack(">2i", 2049, n) + bytes(i % 10 for i in range(n)))):
            name = f"{part}-{kind}-ubyte.gz"
            (mirror / name).write_bytes(gzip.compress(raw))
            resources.append((name, md5((mirror / name).read_bytes()).hexdigest()))
    monkeypatch.setattr(import_torchvision().datasets.MNIST, "resources", resources)
    a = load("mnist", cache=tmp_path / "cache", mirror=mirror.as_uri(), progress=False)
    assert torch.equal(a.test_images[:, 0], torch.from_numpy(images["t10k"]))
    assert a.train_labels.tolist() == [i % 10 for i in range(30)]
    assert (a.augment, a.pad, a.num_classes) == ("none", 2, 10)
    assert abs(a.mean[0] - images["train"].mean() / 255) < 1e-12


# folders

def test_folder_cache_is_reused_until_a_file_changes(tmp_path, monkeypatch):
    root, cache = write_folder(tmp_path / "a"), tmp_path / "cache"
    first = folder(root, cache)
    decode, calls = symbreak.cache._decode, []
    monkeypatch.setattr(symbreak.cache, "_decode", lambda *args: calls.append(1) or decode(*args))
    assert folder(root, cache).digest == first.digest and not calls
    Image.new("RGB", (8, 8), "red").save(root / "train" / "cat" / "0.png")
    changed = folder(root, cache)
    assert calls and changed.digest != first.digest
    assert changed.train_images[0, :, 0, 0].tolist() == [255, 0, 0]
    assert sorted(p.suffix for p in cache.iterdir()) == [".lock", ".pt"]


def test_folder_pixels_labels_and_names(tmp_path):
    root = write_folder(tmp_path / "a", test="val", size=(16, 24))
    Image.new("L", (24, 16), 7).save(root / "val" / "dog" / "1.png")
    (root / "val" / "dog" / ".DS_Store").touch()
    a = folder(root, tmp_path / "cache", train_size=4)
    assert a.test_images.shape == (4, 3, 16, 24) and a.test_labels.tolist() == [0, 0, 1, 1]
    assert a.test_images[3].unique().tolist() == [7]
    expected = np.asarray(Image.open(root / "val" / "cat" / "0.png")).transpose(2, 0, 1)
    assert torch.equal(a.test_images[0], torch.from_numpy(expected.copy()))
    assert (a.name, a.label, a.pad, a.size) == ("folder:a", "a", 2, 16) and a.train_labels.tolist() == [0, 0, 1, 1]
    x, _ = next(iter(a.loader("train", 4)))
    assert x.shape == (4, 3, 16, 24)


def test_moved_folder_is_the_same_data(tmp_path):
    a = folder(write_folder(tmp_path / "a"), tmp_path / "cache")
    b = folder((tmp_path / "a").rename(tmp_path / "b"), tmp_path / "cache")
    assert a.digest == b.digest and (a.label, b.label) == ("a", "b")


def test_cache_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SYMBREAK_CACHE", str(tmp_path / "here"))
    folder(write_folder(tmp_path / "a"), None)
    assert list((tmp_path / "here").glob("a-*.pt"))


def test_many_processes_decode_once(tmp_path):
    root, cache, env = write_folder(tmp_path / "a"), tmp_path / "cache", dict(OMP_NUM_THREADS="1")
    code = f"from symbreak.data import load; print(load('folder:{root}', cache='{cache}', progress=False).digest)"
    with ThreadPoolExecutor(3) as pool: runs = list(pool.map(lambda _: python(code, **env), range(3)))
    assert {run.stdout.strip() for run in runs} == {folder(root, cache).digest}, runs[0].stderr


def test_folder_errors_name_the_culprit(tmp_path):
    root, cache = write_folder(tmp_path / "a"), tmp_path / "cache"
    refuses("nowhere: no such folder", tmp_path / "nowhere", cache)

    odd = root / "train" / "dog" / "9.png"
    odd.write_text("text")
    refuses("dog/9.png: not a readable 8-bit image", root, cache)
    odd.write_bytes((root / "train" / "dog" / "0.png").read_bytes()[:60])
    refuses("dog/9.png: not a readable 8-bit image", root, cache)
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(odd)
    refuses("dog/9.png: not a readable 8-bit image .*more than 8 bits", root, cache)
    Image.new("RGB", (8, 9)).save(odd)
    refuses("dog/9.png: 8x9 pixels, but .*train/cat/0.png has 8x8", root, cache)
    odd.unlink()
    odd.mkdir()
    refuses("dog/9.png: not a file; remove it", root, cache)
    odd.rmdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(odd)  # whoever opens it waits
        refuses("dog/9.png: not a file; remove it", root, cache)
        odd.unlink()

    (root / "train" / "emu").mkdir()
    refuses("train/emu: empty class", root, cache)
    Image.new("RGB", (8, 8)).save(root / "train" / "emu" / "0.png")
    refuses("class in only one of train and test: emu", root, cache)
    (root / "train" / "emu" / "0.png").rename(root / "train" / "0.png")
    (root / "train" / "emu").rmdir()
    refuses("train/0.png: not a folder; expected train/<class>/<image>", root, cache)
    (root / "train" / "0.png").unlink()

    (root / "test").rename(root / "elsewhere")
    refuses("no folder 'test' or 'valid' or 'val'", root, cache)
    (root / "test").mkdir()
    refuses("test: no class folders", root, cache)


def test_names_and_labels_in_other_bytes_than_utf8(tmp_path):
    root, cache = write_folder(tmp_path / "a"), tmp_path / "cache"
    (root / "LABEL").write_bytes("\ufeffCafé\nmore".encode())
    assert folder(root, cache).label == "Café"
    (root / "LABEL").write_bytes("Café".encode("latin-1"))
    with pytest.raises(DataError, match="a/LABEL: not UTF-8; save it as such, or remove it"): folder(root, cache)
    (root / "LABEL").unlink()
    (root / "train" / "cat" / "x.png").symlink_to("nowhere")
    refuses("train/cat/x.png", root, tmp_path / "none")
    (root / "train" / "cat" / "x.png").unlink()
    other = Path(os.fsdecode(os.fsencode(tmp_path / "b") + b"\xe9"))
    root.rename(other)
    refuses(r"b.xe9'?: a name that is not UTF-8; rename the folder", other, tmp_path / "none")


def test_broken_cache(tmp_path):
    root, cache = write_folder(tmp_path / "a"), tmp_path / "cache"
    whole = folder(root, cache)
    stored, = cache.glob("*.pt")
    raw = stored.read_bytes()
    i = raw.index(whole.test_images.numpy().tobytes())
    for damaged in (b"", raw[:-100], raw[:i] + bytes([raw[i] ^ 1]) + raw[i + 1:], b"x" * 500):
        stored.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a-\w+.pt: damaged cache file; delete it"): folder(root, cache)
    stored.unlink()
    assert folder(root, cache).digest == whole.digest


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*args): raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    root = write_folder(tmp_path / "a")
    says = "cannot write the cache .*No space left on device.*make room or choose another folder with .*SYMBREAK_CACHE"
    refuses(says, root, tmp_path / "cache")

    def hidden(*args):  # as torch does it
        try: full()
        finally: raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1152 vs 1046")
    monkeypatch.setattr(torch, "save", hidden)
    refuses(says, root, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


# sources and loaders

def test_digits_does_not_touch_the_global_generators():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1]
    a = load("digits", train_size=500, test_size=100)
    for _ in a.loader("train", 64, augment="crop_flip"): pass
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    assert load("digits").digest == load("digits").digest and (len(a.train_labels), len(a.test_labels)) == (500, 100)


@pytest.mark.parametrize("source", ["", "imagenet", "folder", "folder:", "Digits"])
def test_unknown_source(source):
    with pytest.raises(ValueError, match="source: unknown .*: digits, mnist, cifar10, cifar100, folder:PATH"):
        load(source)


@pytest.mark.parametrize("augment", ["none", "crop", "crop_flip"])
def test_loader_resumes_bit_identically(augment):
    a = load("digits")
    loader = a.loader("train", 100, augment=augment, seed=3)
    for _ in range(2): list(loader)
    state = loader.state_dict()
    resumed = a.loader("train", 100, augment=augment, seed=4)
    resumed.load_state_dict(state)
    for _ in range(2):
        for (x, y), (u, v) in zip(loader, resumed, strict=True):
            assert torch.equal(x, u) and torch.equal(y, v) and x.dtype == u.dtype == torch.float32


def test_every_offset_and_both_flips_occur_equally():
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).repeat(20000, 1, 1, 1)
    loader = Loader(images, torch.zeros(20000), 20000, (0.,), (1 / 255,), augment="crop_flip", pad=1)
    (x, _), = loader
    views, counts = torch.unique(x, dim=0, return_counts=True)
    assert len(views) == 18 and (counts / 20000 - 1 / 18).abs().max() < 5 * (1 / 18 / 20000) ** 0.5  # five sigma


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_host_sync_on_cuda():
    loader = load("digits", device="cuda").loader("train", 100, augment="crop_flip")
    list(loader)
    torch.cuda.set_sync_debug_mode("error")
    try: list(loader)
    finally: torch.cuda.set_sync_debug_mode("default")


# nothing changes without a word

def test_class_folders_that_changed_places_are_decoded_again(tmp_path):
    root, cache = write_folder(tmp_path / "a"), tmp_path / "cache"
    for path in root.rglob("*.png"):
        path.write_bytes(path.read_bytes().ljust(400, b"\0"))  # equal sizes and whole-second times
        os.utime(path, (10 ** 9, 10 ** 9))
    before = folder(root, cache)
    for split in ("train", "test"):
        (root / split / "cat").rename(tmp_path / split)
        (root / split / "dog").rename(root / split / "cat")
        (tmp_path / split).rename(root / split / "dog")
    after = folder(root, cache)
    assert torch.equal(after.train_images, before.train_images.roll(3, 0)) and after.digest != before.digest


def png16(channels, kind):
    "A PNG file with 16 bits per channel"
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    header = struct.pack(">IIBBBBB", 8, 8, 16, kind, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(range(16 * channels))) * 8)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def sgi(compression, size):
    "An SGI file of 8x8 pixels and numbers of so many bytes"
    return struct.pack(">H2B4H", 474, compression, size, 3, 8, 8, 3).ljust(512 + 192 * size, b"\0")


def dds(flags, kind=b"", bits=0, masks=(0,) * 4, more=b""):
    "A DDS file of 8x8 pixels"
    return b"DDS " + struct.pack("<7I44x2I4s5I20x", 124, 0x1007, 8, 8, 0, 0, 0, 32, flags, kind, bits, *masks) + more


def ico(png):
    "An icon of 8x8 pixels, with a PNG file in it"
    return struct.pack("<3H4B2H2I", 0, 1, 1, 8, 8, 0, 0, 1, 24, len(png), 22) + png


AVIF10 = """c-muNU{FXasVqn=%S>Yc0uY^>nP!-qnV9D5Xy^zOdYzkElE?r7iWw<6MNl?FL1uCZ0~+8f$SlbPvlxL`E;A=T8N_h`@fjhajKV-#35Yc^GxO
5mYNddjR3<1dvCP2GIX@>KY*$uhK~Vva_RcIw&Ii&WnZ*UEQ2RKbSfC)YA`>LQ%*Dk8q<9j`44oSl96&<C$@w`&dC55y3`{`C&;S$?&n(D=`3dMS7DlFK79
dkAHzlz|h=Gg4f@A-4CMJdnMj`@0Vg4U|alArLyL$eeuzbq@;{X7;ayRe"""  # of 8x8 pixels


def encoded(kind, bits, feature):
    "A file of 8x8 pixels and so many bits per channel"
    if not features.check(feature): pytest.skip(f"this Pillow has no {kind}")
    if (kind, bits) == ("AVIF", 10): return zlib.decompress(base64.b85decode(AVIF10.replace("\n", "")))
    Image.new("RGB", (8, 8), (1, 2, 3)).save(file := io.BytesIO(), kind)
    return file.getvalue().replace(b"\0\3" + bytes([7, 1, 1]) * 3, b"\0\3" + bytes([bits - 1, 1, 1]) * 3)


@pytest.mark.parametrize("content", [
    png16(1, 0), png16(3, 2), png16(2, 4), png16(4, 6), ico(png16(3, 2)),
    b"P6 8 8 65535\n" + bytes(384), b"P5 8 8 1000\n" + bytes(128),
    b"P3 8 8 65535\n" + b"0 " * 192, b"P2 8 8 1000\n" + b"0 " * 64,
    sgi(0, 2), sgi(1, 2),
    dds(4, b"DX10", more=struct.pack("<5I", 95, 3, 0, 1, 0)), dds(0x40, b"", 32, (0x3ff00000, 0xffc00, 0x3ff, 0)),
    ("JPEG2000", 12, "jpg_2000"), ("AVIF", 10, "avif")])
def test_more_than_8_bits_are_refused_in_every_format(tmp_path, content):
    root = write_folder(tmp_path / "a")
    (root / "train" / "cat" / "0.png").write_bytes(encoded(*content) if isinstance(content, tuple) else content)
    refuses("cat/0.png: not a readable 8-bit image .*more than 8 bits per channel", root, tmp_path / "cache")


BMP565 = b"BM" + struct.pack("<6I2H9I128x", 194, 0, 66, 40, 8, 8, 1, 16, 3, 128, 0, 0, 0, 0, 0xf800, 0x7e0, 0x1f)


@pytest.mark.parametrize("content", [
    BMP565, b"P3 8 8 255\n" + b"0 " * 192, b"P1 8 8\n" + b"0 " * 64, b"P6 8 8 100\n" + bytes(192),
    sgi(0, 1), dds(0x40, b"", 24, (0xff0000, 0xff00, 0xff, 0), bytes(192)),
    ("JPEG2000", 8, "jpg_2000"), ("AVIF", 8, "avif")])
def test_8_bits_are_read_in_every_format(tmp_path, content):
    (tmp_path / "a").write_bytes(encoded(*content) if isinstance(content, tuple) else content)
    assert symbreak.cache._image(tmp_path / "a").shape == (3, 8, 8)


@pytest.mark.parametrize("mode, transparency, says", [
    ("RGBA", None, "transparent pixels"), ("LA", None, "transparent pixels"), ("P", 0, "transparent pixels"),
    ("RGB", (0, 0, 0), "transparent pixels"), ("L", 0, "transparent pixels"), ("CMYK", None, "mode 'CMYK'; allowed: ")])
def test_what_would_be_lost_is_refused(tmp_path, mode, transparency, says):
    root = write_folder(tmp_path / "a")
    kind = {} if transparency is None else dict(transparency=transparency)
    Image.new(mode, (8, 8)).save(root / "train" / "cat" / "0.png", "JPEG" if mode == "CMYK" else "PNG", **kind)
    refuses(f"cat/0.png: not a readable 8-bit image .*{says}", root, tmp_path / "cache")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_that_look_alike_are_read_alike(tmp_path, orientation):
    seen = Image.fromarray(np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8))
    stored = {1: (), 2: (0,), 3: (3,), 4: (1,), 5: (5,), 6: (2,), 7: (6,), 8: (4,)}[orientation]
    turned, exif = seen, Image.Exif()
    for how in stored: turned = turned.transpose(Image.Transpose(how))
    exif[0x0112] = orientation
    turned.save(tmp_path / "a.png", exif=exif)
    assert (symbreak.cache._image(tmp_path / "a.png") == np.asarray(seen).transpose(2, 0, 1)).all()


def test_one_class_in_two_spellings_has_one_label(tmp_path):
    root = write_folder(tmp_path / "a", classes=("z", "caf\u00e9"))
    (root / "test" / "caf\u00e9").rename(root / "test" / "cafe\u0301")
    a = folder(root, tmp_path / "cache")
    assert a.classes == ("caf\u00e9", "z") and a.test_labels.tolist() == [0, 0, 1, 1]


def test_a_class_is_never_left_without_an_image():
    labels = torch.tensor([0] * 500 + [1] * 60 + [2] * 5)
    images = torch.zeros(565, 1, 8, 8, dtype=torch.uint8)
    a = Dataset("a", "a", images, labels, images, labels, ("cat", "dog", "emu"), (0.,), (1.,))
    for size in range(1, 566):
        for argument in ("train_size", "test_size"):
            try: taken = a.subset(**{argument: size})
            except ValueError as e:
                assert re.search(rf"{argument}: {size} leaves no image of class .*'emu' \(5 of 565 images\)", str(e))
                assert size < 113
            else: assert getattr(taken, argument.replace("size", "labels")).bincount().min() > 0


def test_what_a_killed_download_has_left_is_taken_away_by_the_next(cifar, tmp_path):
    mirror, cache = cifar[0], tmp_path / "cache"
    cache.mkdir()
    code = ("import os, sys; from pathlib import Path; from symbreak.files import temporary_folder\n"
            "with temporary_folder(Path(sys.argv[1]), '.download-') as folder:\n"
            "    (folder / 'half').touch(); os.kill(os.getpid(), 9)")
    subprocess.run([sys.executable, "-c", code, str(cache)])
    assert [path.name for path in cache.glob(".download-*/half")] == ["half"]
    load("cifar10", cache=cache, mirror=mirror.as_uri(), progress=False)
    assert not list(cache.glob(".download-*"))


def test_a_relative_folder_is_found_in_the_checkout_of_the_library_from_anywhere(tmp_path, monkeypatch):
    here, own = tmp_path / "here", tmp_path / "own"
    here.mkdir()
    pets = own / "data" / "pets"
    write_folder(pets)
    monkeypatch.chdir(here)
    monkeypatch.setattr("symbreak.cache.own_checkout", lambda: own)
    assert load("folder:data/pets", tmp_path, progress=False).digest == load(f"folder:{pets}", tmp_path).digest
    with pytest.raises(DataError, match=f"data/cats: no such folder in {here}, {own} or the cache; expected one with"):
        load("folder:data/cats", tmp_path)
