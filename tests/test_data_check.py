"""The data set report, and downloads from a server on this machine."""
from __future__ import annotations

import hashlib
import io
import re
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.config import DataOptions
from utils.data import check
from utils.data import download as download_module
from utils.data.download import download, unpack
from utils.data.open import open_splits
from utils.data.spec import load_data_spec
from utils.errors import USER_ERROR, UserError


def photo(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.random.default_rng(seed).integers(0, 256, (64, 128, 3), np.uint8))


@pytest.fixture
def odd_set(tmp_path) -> Path:
    """One of every oddity."""
    for n, (split, stem) in enumerate([("train", "a"), ("train", "b"), ("train", "c"), ("train", "tail"), ("val", "d")]):
        photo(tmp_path / "images" / split / f"{stem}.jpg", n)
        (tmp_path / "labels" / split).mkdir(parents=True, exist_ok=True)
    (tmp_path / "images/val/copy.jpg").write_bytes((tmp_path / "images/train/a.jpg").read_bytes())
    broken = tmp_path / "images/train/broken.jpg"
    broken.write_bytes((tmp_path / "images/train/a.jpg").read_bytes()[:900])
    (tmp_path / "labels/train/a.txt").write_text("0 .5 .5 .25 .5\n0 .5 .5 .25 .5\n1 .9 .5 .3 .1\n1 .9 .5 .21 .1\n")
    (tmp_path / "labels/train/b.txt").write_text("1 .5 .5 .25 .5\n1 .25 .5 .25 .5\n")
    (tmp_path / "labels/val/d.txt").write_text("0 .5 .5 .25 .5\n")
    (tmp_path / "d.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames: [cat, horse]\n")
    return tmp_path


def test_the_report_names_every_oddity(odd_set, capsys):
    assert check.main(["--data", str(odd_set / "d.yaml")]) == 0
    text = capsys.readouterr().out
    for expected in ("train: 4 images, 4 boxes, 2 backgrounds, 3 without labels, 1 broken images, 1 duplicate boxes, 1 boxes clipped,",
                     "1 boxes dropped",
                     "128x64 (4)", "broken.jpg: ", "a.txt:2: dropped: an exact copy", "a.txt:3: dropped: lies outside its image by 5.0%",
                     "identical images: 1 groups", "train and val share 1 images", "boxes an image: 1.0, at most 2"):
        assert expected in text, expected
    assert re.search(r"cat +1 #{13}\n +horse +3 #{40}\n", text)


def test_one_split_quickly_and_mistakes(odd_set, capsys):
    assert check.main(["--data", str(odd_set / "d.yaml"), "--split", "val", "--quick"]) == 0
    assert "train" not in capsys.readouterr().out.replace(str(odd_set), "")
    (odd_set / "labels/val/d.txt").write_text("2 .5 .5 .25 .5\n")
    assert check.main(["--data", str(odd_set / "d.yaml")]) == USER_ERROR
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "d.txt:1: class 2" in error


def test_pixels_that_can_not_be_decoded_are_found(odd_set, capsys):
    path = odd_set / "images/val/d.jpg"
    path.with_suffix(".png").write_bytes(cv2.imencode(".png", cv2.imread(str(path)))[1].tobytes())
    path.unlink()
    content = bytearray(path.with_suffix(".png").read_bytes())
    content[2000:2100] = bytes(100)  # ends well, so that only decoding tells
    path.with_suffix(".png").write_bytes(content)
    assert check.main(["--data", str(odd_set / "d.yaml"), "--split", "val"]) == 0
    assert "d.png: can't be decoded: broken" in capsys.readouterr().out


def test_an_empty_class_and_no_box_at_all(odd_set, capsys):
    (odd_set / "labels/train/a.txt").write_text("")
    (odd_set / "labels/train/b.txt").write_text("")
    assert check.main(["--data", str(odd_set / "d.yaml"), "--split", "train"]) == 0
    assert "train: 4 images, 0 boxes, 4 backgrounds" in capsys.readouterr().out


# --- downloads ---------------------------------------------------------------------------------------------------------------------------------


class Server(BaseHTTPRequestHandler):
    files: dict[str, bytes] = {}  # noqa: RUF012 - shared on purpose
    ranges: list[str | None] = []  # noqa: RUF012
    cut: int | None = None  # bytes after which the connection breaks, once

    def do_GET(self) -> None:
        body, wanted = self.files.get(self.path), self.headers.get("Range")
        self.ranges.append(wanted)
        if body is None:
            return self.send_error(404)
        start = int(wanted.split("=")[1].rstrip("-")) if wanted else 0
        if start >= len(body) and wanted:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        end, Server.cut = Server.cut, None
        self.wfile.write(body[start:end])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Server.files, Server.ranges, Server.cut = {}, [], None
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(files: dict[str, bytes], *links: tuple[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            item = tarfile.TarInfo(name)
            item.size = len(content)
            archive.addfile(item, io.BytesIO(content))
        for name, target in links:
            item = tarfile.TarInfo(name)
            item.type, item.linkname = tarfile.SYMTYPE, target
            archive.addfile(item)
    return buffer.getvalue()


def spec_for(tmp_path: Path, *downloads: str):
    lines = "\n".join(f"  - {{{item}}}" for item in downloads)
    (tmp_path / "d.yaml").write_text(f"path: mine\ntrain: images\nnames: [a]\ndownload:\n{lines}\n")
    return load_data_spec(str(tmp_path / "d.yaml"), str(tmp_path / "sets"))


def test_download_checks_unpacks_and_is_done_once(tmp_path, server):
    body = zipped({"images/a.txt": b"hello", "images/deep/b.txt": b"there"})
    Server.files = {"/x.zip": body, "/y.tar.gz": tarred({"labels/a.txt": b"tar"})}
    spec = spec_for(tmp_path, f'url: "{server}/x.zip", sha256: {hashlib.sha256(body).hexdigest()}', f'url: "{server}/y.tar.gz", to: more')
    for _ in range(2):
        assert download(spec) == tmp_path / "sets" / "mine"
    assert len(Server.ranges) == 2
    root = tmp_path / "sets" / "mine"
    assert (root / "images/deep/b.txt").read_bytes() == b"there" and (root / "more/labels/a.txt").read_bytes() == b"tar"
    assert not list(root.glob("**/*.part")) and not (root / "x.zip").exists()


def test_what_was_removed_is_fetched_again_and_what_is_there_is_not(tmp_path, server):
    picture = cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    Server.files = {"/x.zip": zipped({"images/a.png": picture, "labels/a.txt": b"0 0.5 0.5 0.5 0.5"})}
    spec = spec_for(tmp_path, f'url: "{server}/x.zip"')
    download(spec)
    shutil.rmtree(spec.root / "images")
    download(spec)
    assert (spec.root / "images/a.png").exists() and len(Server.ranges) == 2
    (spec.root / ".x.zip.unpacked").unlink()  # as if it had been put there by hand
    options = DataOptions(data=str(spec.file), data_root=str(tmp_path / "sets"), download=True)
    assert open_splits(options, ("train",))[0].report.boxes == 1 and len(Server.ranges) == 2


def test_what_is_missing_is_fetched_when_asked_for(tmp_path, server):
    picture = cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    Server.files = {"/x.zip": zipped({"images/a.png": picture, "labels/a.txt": b"0 0.5 0.5 0.5 0.5"})}
    spec = spec_for(tmp_path, f'url: "{server}/x.zip"')
    options = DataOptions(data=str(spec.file), data_root=str(tmp_path / "sets"))
    with pytest.raises(UserError, match=r"images is missing; .* \(or --download\)$"):
        open_splits(options, ("train",))
    assert not Server.ranges
    assert open_splits(replace(options, download=True), ("train",))[0].report.boxes == 1 and len(Server.ranges) == 1


def test_an_address_that_names_no_file_is_no_mistake_where_the_data_are_there(tmp_path):
    spec = spec_for(tmp_path, 'url: "http://127.0.0.1:9/"')
    (spec.root / "images").mkdir(parents=True)
    (spec.root / "labels").mkdir()
    (spec.root / "images/a.png").write_bytes(cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes())
    (spec.root / "labels/a.txt").write_text("0 .5 .5 .5 .5")
    assert open_splits(DataOptions(data=str(spec.file), data_root=str(tmp_path / "sets")), ("train",))[0].report.boxes == 1


def test_half_an_archive_is_not_taken_for_the_data_set(tmp_path, server, monkeypatch):
    picture = cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    labels = {f"labels/{n}.txt": b"0 .5 .5 .5 .5" for n in range(4)}
    Server.files = {"/x.zip": zipped({f"images/{n}.png": picture for n in range(4)} | labels)}
    spec = spec_for(tmp_path, f'url: "{server}/x.zip"')
    options = DataOptions(data=str(spec.file), data_root=str(tmp_path / "sets"), download=True)
    copies, copy = [], shutil.copyfileobj

    def interrupted(source, stream, size):
        copies.append(stream.name)
        if len(copies) == 5:  # the first is the fetching
            raise KeyboardInterrupt
        copy(source, stream, size)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("utils.data.download.shutil.copyfileobj", interrupted)
        open_splits(options, ("train",))
    assert (spec.root / "images").exists()
    with pytest.raises(UserError, match=r"x\.zip was not unpacked to its end, or another process does so now; fetch it with: .*--download"):
        open_splits(replace(options, download=False), ("train",))
    split = open_splits(options, ("train",))[0]
    assert (len(split.images), split.report.boxes, len(Server.ranges)) == (4, 4, 1) and not list(spec.root.glob(".*.unpacking"))
    assert len(open_splits(replace(options, download=False), ("train",))[0].images) == 4


def test_a_broken_download_goes_on_where_it_stopped(tmp_path, server):
    body = zipped({"images/a.bin": np.random.default_rng(0).bytes(300_000)})
    Server.files, Server.cut = {"/x.zip": body}, 100_000
    spec = spec_for(tmp_path, f'url: "{server}/x.zip"')
    with pytest.raises(UserError, match="run the command again"):
        download(spec)
    assert not (spec.root / "images").exists()
    download(spec)
    assert Server.ranges == [None, "bytes=100000-"]
    assert (spec.root / "images/a.bin").stat().st_size == 300_000


def test_a_part_that_is_complete_needs_no_byte_more(tmp_path, server):
    body = zipped({"images/a.txt": b"hello"})
    Server.files = {"/x.zip": body}
    spec = spec_for(tmp_path, f'url: "{server}/x.zip"')
    spec.root.mkdir(parents=True)
    (spec.root / "x.zip.part").write_bytes(body)
    download(spec)
    assert (spec.root / "images/a.txt").exists()
    Server.files["/y.zip"] = body
    (spec.root / "y.zip.part").write_bytes(body + b"more than there is")
    with pytest.raises(UserError, match="does not fit"):
        download(spec_for(tmp_path, f'url: "{server}/y.zip"'))
    assert not (spec.root / "y.zip.part").exists()


def test_a_wrong_checksum_removes_the_file(tmp_path, server):
    Server.files = {"/x.zip": zipped({"images/a.txt": b"hello"})}
    spec = spec_for(tmp_path, f'url: "{server}/x.zip", md5: "{"0" * 32}"')
    with pytest.raises(UserError, match="md5 is"):
        download(spec)
    assert list(spec.root.iterdir()) == []


def test_refusals_in_one_line(tmp_path, server, capsys):
    assert download_module.main(["--data", str(spec_for(tmp_path, f'url: "{server}/no.zip"').file), "--data-root", str(tmp_path)]) == USER_ERROR
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "404" in error
    (tmp_path / ".no.zip.unpacked").touch()
    with pytest.raises(UserError, match="leaves the folder"):
        download(spec_for(tmp_path, f'url: "{server}/no.zip", to: ../..'))
    assert (tmp_path / ".no.zip.unpacked").exists()  # nor is anything removed there
    with pytest.raises(UserError, match="can't be fetched"):
        download(spec_for(tmp_path, 'url: "http://127.0.0.1:1/x.zip"'))
    (tmp_path / "sets/mine").mkdir(parents=True, exist_ok=True)
    (tmp_path / "sets/mine").chmod(0o555)
    with pytest.raises(UserError, match="not writable"):
        download(spec_for(tmp_path, f'url: "{server}/no.zip"'))
    (tmp_path / "sets/mine").chmod(0o755)
    with pytest.raises(UserError, match="32 hexadecimal digits in quotes"):
        spec_for(tmp_path, f'url: "{server}/no.zip", md5: 00000')
    (tmp_path / "n.yaml").write_text("train: images\nnames: [a]\n")
    with pytest.raises(UserError, match="names no download"):
        download(load_data_spec(str(tmp_path / "n.yaml")))


def test_what_arrived_is_not_the_data_set(tmp_path, server):
    Server.files = {"/x.zip": zipped({"pictures/a.txt": b"hello"})}
    with pytest.raises(UserError, match="train: images is not in"):
        download(spec_for(tmp_path, f'url: "{server}/x.zip"'))


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "a/../../evil.txt", "..\\evil.txt", "C:/evil.txt"])
@pytest.mark.parametrize("make", [zipped, tarred])
def test_archives_that_leave_their_folder_are_refused_whole(tmp_path, make, name):
    (tmp_path / "in").mkdir()
    archive = tmp_path / "x.bin"
    archive.write_bytes(make({"good.txt": b"1", name: b"2"}))
    with pytest.raises(UserError, match="outside its folder"):
        unpack(archive, tmp_path / "in")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "x.bin"]


def test_links_and_damaged_archives_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    archive = tmp_path / "x.bin"
    archive.write_bytes(tarred({"good.txt": b"1"}, ("link", "/etc")))
    with pytest.raises(UserError, match="link or a device"):
        unpack(archive, tmp_path / "in")
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(link, "/etc")
    with pytest.raises(UserError, match="link or a device"):
        unpack(archive, tmp_path / "in")
    content = bytearray(zipped({"a.txt": b"x" * 1000}))
    content[200:300] = bytes(100)
    archive.write_bytes(content)
    with pytest.raises(UserError, match="damaged archive"):
        unpack(archive, tmp_path / "in")
