"""From a data YAML to a verified split of YOLO labels: hand-worked boxes, a slow parser as oracle, the cache, the mistakes."""
from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from utils.data import labels as labels_module
from utils.data.cache import cache_file
from utils.data.labels import load_split
from utils.data.spec import load_data_spec
from utils.data.yolo_text import _parse_together, label_path, parse_yolo_line
from utils.errors import UserError


def make_set(root: Path, labels: dict[str, str | None], yaml: str = "path: .\ntrain: images/train\nnames: [a, b, c]\n", size=(40, 30)) -> str:
    """Images of `size` in images/train with these label texts (None: no label file); returns the YAML's path."""
    for stem, text in labels.items():
        image = root / "images" / "train" / f"{stem}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(image), np.zeros((size[1], size[0], 3), np.uint8))
        if text is not None:
            label = root / "labels" / "train" / f"{stem}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(text)
    (root / "set.yaml").write_text(yaml)
    return str(root / "set.yaml")


def scan(root: Path, labels: dict[str, str | None], **options):
    return load_split(load_data_spec(make_set(root, labels)), "train", **{"progress": False, **options})


def test_boxes_sizes_and_ids(tmp_path):
    split = scan(tmp_path, {"0007": "2 0.5 0.5 0.2 0.4\n\n0 0.25 0.75 0.5 0.5", "b": None, "c": "\n"})
    assert [Path(p).name for p in split.images] == ["0007.png", "b.png", "c.png"]
    assert split.sizes.tolist() == [[40, 30]] * 3 and split.sizes.dtype == np.int32
    assert split.boxes[0].dtype == np.float32
    np.testing.assert_array_equal(split.boxes[0], np.float32([[2, 0.5, 0.5, 0.2, 0.4], [0, 0.25, 0.75, 0.5, 0.5]]))
    assert [b.shape for b in split.boxes] == [(2, 5), (0, 5), (0, 5)] == [(2, 5), *[c.shape for c in split.crowds[1:]]]
    assert split.image_ids == ("0007", "b", "c") and split.category_ids == (0, 1, 2) and split.areas is None
    assert (split.report.images, split.report.boxes, split.report.backgrounds, split.report.unlabelled) == (3, 2, 2, 1)
    assert split.report.problems == ()


def test_ids_are_numbers_where_all_are(tmp_path):
    """COCO's tools sort them."""
    assert scan(tmp_path, {"0007": None, "12": "0 0.5 0.5 0.1 0.1"}).image_ids == (7, 12)


def test_labels_that_are_not_there_or_cannot_be_read(tmp_path):
    labels = {"a": "0 0.5 0.5 0.1 0.1", "b": None, "c": ""}
    assert scan(tmp_path, labels).report.summary() == "3 images, 1 boxes, 2 backgrounds, 1 without labels"
    (tmp_path / "labels/train/b.txt").symlink_to("b.txt")
    with pytest.raises(UserError, match=r"labels/train/b\.txt: can't be read: Too many levels"):
        scan(tmp_path, {}, cache=False)


def test_lists_that_windows_wrote(tmp_path):
    make_set(tmp_path, {"a": "0 0.5 0.5 0.1 0.1", "b": "1 0.5 0.5 0.1 0.1"})
    (tmp_path / "train.txt").write_bytes("\ufeffimages\\train\\a.png\r\nimages\\train\\b.png\r\n".encode())
    yaml = "path: .\ntrain: train.txt\nnames: [a, b, c]\n"
    split = load_split(load_data_spec(make_set(tmp_path, {}, yaml)), "train", progress=False)
    assert [Path(path).name for path in split.images] == ["a.png", "b.png"] and split.report.boxes == 2
    (tmp_path / "train.txt").write_text("/gone/images/a.png\n/gone/images/b.png\n")
    with pytest.raises(UserError, match=r"train: none of 2 images can be read; /gone/images/a\.png: "):
        load_split(load_data_spec(make_set(tmp_path, {}, yaml)), "train", progress=False)


@pytest.mark.parametrize("beside", ["rf", "rf/yaml"])
def test_exports_that_name_their_folders_from_another_place(tmp_path, monkeypatch, beside):
    """Roboflow's data.yaml lies beside train/ and says ../train/images, from which it may have been moved."""
    make_set(tmp_path / "rf/train", {"a": "0 0.5 0.5 0.1 0.1"})
    (tmp_path / "rf/train/images/train").rename(tmp_path / "rf/train/moved")
    (tmp_path / "rf/train/images").rmdir()
    (tmp_path / "rf/train/moved").rename(tmp_path / "rf/train/images")
    (tmp_path / "rf/train/labels/train/a.txt").rename(tmp_path / "rf/train/labels/a.txt")
    (tmp_path / beside).mkdir(exist_ok=True)
    (tmp_path / beside / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnames: [a]\n")
    monkeypatch.chdir(tmp_path)
    split = load_split(load_data_spec(f"{beside}/data.yaml"), "train", progress=False)
    assert split.images == (str(tmp_path / "rf/train/images/a.png"),) and split.report.boxes == 1


def test_names_as_yaml_reads_them(tmp_path):
    yaml = "path: .\ntrain: images/train\nnames: "
    assert load_data_spec(make_set(tmp_path, {}, yaml + "{'0': cat, '1': dog}\n")).names == ("cat", "dog")
    with pytest.raises(UserError, match=r"names: to YAML yes, no, on and off are truth values: put such a name in quotes"):
        load_data_spec(make_set(tmp_path, {}, yaml + "[yes, no]\n"))


def test_a_download_script_is_named_and_not_run(tmp_path):
    yaml = "path: gone\ntrain: images/train\nnames: [a]\ndownload: |\n  import os\n  os.mkdir('ran')\n"
    with pytest.raises(UserError, match="its download: is a script, which is not run here: run it yourself"):
        load_split(load_data_spec(make_set(tmp_path, {}, yaml)), "train", progress=False)


def test_folders_called_like_images_and_links_that_lead_back(tmp_path):
    make_set(tmp_path, {"jpg/a": "0 0.5 0.5 0.1 0.1", "b.png/c": "1 0.5 0.5 0.1 0.1"})
    (tmp_path / "images/train/jpg/back").symlink_to(tmp_path / "images")
    split = scan(tmp_path, {})
    assert [Path(path).name for path in split.images] == ["c.png", "a.png"] and split.report.boxes == 2 and not split.report.problems


def test_overshoot_up_to_one_per_cent_is_clipped_and_more_drops_the_box_alone(tmp_path):
    split = scan(tmp_path, {
        "a": "0 0.5 0.5 1.02 1.0\n"  # 1 % on both sides: cut to the whole width
             "1 0.895 0.5 0.23 0.2\n"  # right edge 1.01
             "1 0.9 0.5 0.23 0.2\n"  # 1.015
             "2 0.5 0.02 0.1 0.07\n"  # top edge -0.015
             "2 0.5000005 0.5 1.0 0.5\n"})  # six decimals' dust
    np.testing.assert_allclose(split.boxes[0], [[0, 0.5, 0.5, 1, 1], [1, 0.89, 0.5, 0.22, 0.2], [2, 0.5, 0.5, 1, 0.5]], atol=1e-6)
    assert (split.report.clipped, split.report.dropped) == (2, 2)
    label = tmp_path / "labels/train/a.txt"
    assert [p.split(": ")[0] for p in split.report.problems] == [f"{label}:3", f"{label}:4"]
    assert "1.5%" in split.report.problems[0]
    corners = np.hstack((split.boxes[0][:, 1:3] - split.boxes[0][:, 3:] / 2, split.boxes[0][:, 1:3] + split.boxes[0][:, 3:] / 2))
    assert corners.min() >= -1e-6 and corners.max() <= 1 + 1e-6


def test_boxes_without_area_and_exact_copies_are_dropped_and_listed(tmp_path):
    split = scan(tmp_path, {"a": "0 0.5 0.5 0.0 0.4\n1 0.5 0.5 0.2 0.4\n1 .5 .5 .2 .4\n2 0.5 0.5 0.2 0.4\n", "b": "1 0.5 0.5 0.2 0.4\n"})
    assert [b[:, 0].tolist() for b in split.boxes] == [[1, 2], [1]]  # neither another class nor another image makes a copy
    assert (split.report.dropped, split.report.duplicates) == (1, 1)
    assert [p.partition(".txt:")[2][:1] for p in split.report.problems] == ["1", "3"]


def test_polygons_become_their_bounding_box(tmp_path):
    split = scan(tmp_path, {"a": "1 0.1 0.2 0.5 0.2 0.3 0.8\n0 0.5 0.5 0.1 0.1\n"})
    np.testing.assert_allclose(split.boxes[0], [[1, 0.3, 0.5, 0.4, 0.6], [0, 0.5, 0.5, 0.1, 0.1]], atol=1e-6)


@pytest.mark.parametrize(("line", "words"), [
    ("3 0.5 0.5 0.1 0.1", "names 3 (0 to 2)"),
    ("0 nan 0.5 0.1 0.1", "not a finite number"),
    ("0 0.5 0.5 inf 0.1", "not a finite number"),
    ("-1 0.5 0.5 0.1 0.1", "negative"),
    ("0 0.5 0.5 -0.1 0.1", "negative"),
    ("0 0.5 0.5 0.1", "4 columns"),
    ("0 0.5 0.5 0.1 0.1 0.9", "6 columns"),
    ("0.5 0.5 0.5 0.1 0.1", "not a whole number"),
    ("cat 0.5 0.5 0.1 0.1", "not a row of numbers"),
    ("0 0.5 0.5 0.1 0.1px", "not a row of numbers"),
    ("0,0.5,0.5,0.1,0.1", "1 columns"),
])
def test_mistakes_name_file_and_line(tmp_path, line, words):
    with pytest.raises(UserError) as error:
        scan(tmp_path, {"a": "0 0.5 0.5 0.1 0.1\n", "b": f"0 0.5 0.5 0.1 0.1\n\n{line}\n{line}\n"})
    assert f"{tmp_path / 'labels/train/b.txt'}:3: " in str(error.value) and words in str(error.value)
    assert "1 more" in str(error.value) and "\n" not in str(error.value)


def test_pixels_instead_of_fractions_are_recognised(tmp_path):
    with pytest.raises(UserError, match="in pixels"):
        scan(tmp_path, {"a": "0 20 15 8 8\n", "b": "1 10 10 5 5\n"})


def test_broken_images_are_left_out_with_their_boxes(tmp_path):
    make_set(tmp_path, {n: f"{c} 0.5 0.5 0.1 0.1\n" for c, n in enumerate("abc")})
    whole = (tmp_path / "images/train/b.png").read_bytes()
    (tmp_path / "images/train/b.png").write_bytes(whole[: len(whole) // 2])
    split = load_split(load_data_spec(str(tmp_path / "set.yaml")), "train", progress=False)
    assert [Path(p).name for p in split.images] == ["a.png", "c.png"] and [b[0, 0] for b in split.boxes] == [0, 2]
    assert split.report.broken == 1 and "b.png" in split.report.problems[0]
    for name in "ac":
        (tmp_path / f"images/train/{name}.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of 3 images"):
        load_split(load_data_spec(str(tmp_path / "set.yaml")), "train", progress=False)


ODD_NUMBER = st.sampled_from(["1", "0", ".5", "1.", "0.1e-2", "+0.25", "1e-400"])
NUMBER = st.one_of(st.floats(0, 1).map(str), st.floats(0, 1).map("{:.6f}".format), ODD_NUMBER)
ROW = st.tuples(st.sampled_from(["0", "1", "2.0"]), NUMBER, NUMBER, NUMBER, NUMBER).map(" ".join)
LINE = st.one_of(st.just(""), ROW, st.sampled_from(
    ["7 .1 .1 .1 .1", "0 . .1 .1 .1", "0 1.2.3 .1 .1 .1", "0 .1 .1 .1", "x", "0 .1 .1 .3 .1 .2 .3", "\t"]))


@example([["0 0.25 0.75 0.123456 0.5"], ["0 1 .5 1. 0.000001"]], "\n")
@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.lists(LINE, max_size=4), max_size=6), st.sampled_from(["\n", "\r\n"]))
def test_files_parsed_together_equal_files_parsed_line_by_line(files, newline):
    texts = [newline.join(lines).encode() for lines in files]
    table, owner, line, doubtful = _parse_together(texts, 3)
    for n, text in enumerate(texts):
        expected = []
        for number, words in enumerate(text.decode().splitlines(), 1):
            if words.strip():
                try:
                    expected.append((number, *parse_yolo_line(words, 3, "x.yaml")))
                except ValueError:
                    assert n in doubtful
        if n not in doubtful:
            mine = [(int(k), *row) for k, row in zip(line[owner == n], table[owner == n].tolist(), strict=True)]
            assert mine == expected  # to the last bit
        else:
            assert not (owner == n).any()


def test_label_path_replaces_the_last_images():
    assert label_path("/d/images/x/images/t/a.b.jpg", "labels") == "/d/images/x/labels/t/a.b.txt"
    assert label_path("/d/photos/a.jpg", "labels") == "/d/photos/a.txt"


# --- cache -------------------------------------------------------------------------------------------------------------------------------------


def forbid_reading(monkeypatch):
    monkeypatch.setattr(labels_module, "_verify", lambda *_: pytest.fail("the labels were read again"))


def test_the_cache_gives_the_same_split_and_notices_every_change(tmp_path, monkeypatch):
    yaml = make_set(tmp_path, {"a": "0 0.5 0.5 0.1 0.1\n0 0.9 0.9 0.9 0.9\n", "b": None}, "path: .\ntrain: images/train\nval: images/train\nnc: 3\n")
    spec = load_data_spec(yaml)
    first = {name: load_split(spec, name, progress=False) for name in ("train", "val")}
    with monkeypatch.context() as patch:
        forbid_reading(patch)
        for name in ("train", "val"):  # neither evicted the other
            again = load_split(spec, name, progress=False)
            assert again.report == first[name].report and again.fingerprint == first[name].fingerprint
            for key, value in first[name].__dict__.items():
                assert str(getattr(again, key)) == str(value), key
    label = tmp_path / "labels/train/a.txt"
    label.write_text(label.read_text().replace("0 0.5", "1 0.5"))  # of the same length
    assert load_split(spec, "train", progress=False).boxes[0][0, 0] == 1
    label.write_text("1 0.5 0.5 0.1 0.1\n")
    (tmp_path / "labels/train/b.txt").write_text("2 0.5 0.5 0.1 0.1\n")
    assert load_split(spec, "train", progress=False).report.boxes == 2
    (tmp_path / "images/train/a.png").unlink()
    assert load_split(spec, "train", progress=False).report.images == 1
    (tmp_path / "set.yaml").write_text("path: .\ntrain: images/train\nnc: 2\n")
    with pytest.raises(UserError, match="names 2"):
        load_split(load_data_spec(yaml), "train", progress=False)


@pytest.mark.parametrize("damage", [b"", b"not a zip", None])
def test_a_damaged_cache_is_read_anew(tmp_path, damage):
    first = scan(tmp_path, {"a": "0 0.5 0.5 0.1 0.1\n"})
    (file,) = (tmp_path / ".light-yolo").glob("*.npz")
    file.write_bytes(file.read_bytes()[:-30] if damage is None else damage)
    assert scan(tmp_path, {"a": "0 0.5 0.5 0.1 0.1\n"}).fingerprint == first.fingerprint


def test_old_cache_files_do_not_pile_up(tmp_path):
    for n in range(7):
        scan(tmp_path, {"a": "0 0.5 0.5 0.1 0.1\n" * (n + 1)})
    assert len(list((tmp_path / ".light-yolo").glob("set-train-*.npz"))) == 4


def test_two_scans_at_once(tmp_path):
    spec = load_data_spec(make_set(tmp_path, {str(n): f"{n % 3} 0.5 0.5 0.1 0.1\n" for n in range(30)}))
    with ThreadPoolExecutor(4) as pool:
        prints = {s.fingerprint for s in pool.map(lambda _: load_split(spec, "train", progress=False), range(8))}
    assert len(prints) == 1 and len(list((tmp_path / ".light-yolo").iterdir())) == 1


def test_data_without_a_write_bit_are_cached_in_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    root = tmp_path / "data"
    root.mkdir()
    assert cache_file(root, "n", "k").parent == root / ".light-yolo"
    root.chmod(0o555)
    assert (tmp_path / "home" / "light-yolo") in cache_file(root, "n", "k").parents
    root.chmod(0o755)


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path):
    texts = {"a": "0 0.5 0.5 0.1 0.1\n", "b": None}
    here, there = scan(tmp_path / "x", texts), scan(tmp_path / "y", texts)
    assert here.fingerprint == there.fingerprint
    assert scan(tmp_path / "z", {**texts, "b": "0 0.5 0.5 0.1 0.1\n"}).fingerprint != here.fingerprint


def test_single_class(tmp_path):
    split = scan(tmp_path, {"a": "2 0.5 0.5 0.1 0.1\n0 0.5 0.5 0.1 0.1\n"}, single_cls=True)
    assert split.names == ("item",) and split.category_ids == (0,) and split.boxes[0][:, 0].tolist() == [0, 0]


def test_ids_are_never_two_the_same(tmp_path):
    assert scan(tmp_path / "1", {"01": None, "1": "0 0.5 0.5 0.1 0.1"}).image_ids == ("01", "1")
    make_set(tmp_path / "2", {"1": "0 0.5 0.5 0.1 0.1"})
    (tmp_path / "2/images/train/sub").mkdir()
    cv2.imwrite(str(tmp_path / "2/images/train/sub/1.png"), np.zeros((9, 9, 3), np.uint8))
    ids = load_split(load_data_spec(str(tmp_path / "2/set.yaml")), "train", progress=False).image_ids
    assert ids == ("images/train/1.png", "images/train/sub/1.png")


# --- the data YAML -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("yaml", "words"), [
    ("train: images/train\nnc: 2\nnames: [a, b, c]", "nc is 2 but names has 3"),
    ("train: images/train\nnames: [a]\nflip: 1", "unknown key 'flip'"),
    ("train: images/train\nnmaes: [a]", "did you mean names"),
    ("train: images/train\nnames: {0: a, 2: b}", "0 to 1"),
    ("train: images/train", "names: expected a list"),
    ("names: [a]", "names no split"),
    ("train: images/train\nnames: [a]\nformat: cocoo", "did you mean coco"),
    ("train: images/train\nnames: [a]\ndownload: [{url: 'ftp://x'}]", "expected a URL"),
    ("train: 3\nnames: [a]", "expected a path"),
    ("train: images/train\nnames: [a, a]\nformat: voc", "stands twice"),
    ("train: images/train\nnames: [a]\ngenerate: cats", "only generated data set is shapes"),
])
def test_mistakes_in_the_yaml(tmp_path, yaml, words):
    (tmp_path / "d.yaml").write_text(yaml)
    with pytest.raises(UserError, match=r"d\.yaml") as error:
        load_data_spec(str(tmp_path / "d.yaml"))
    assert words in str(error.value)


def test_names_as_dict_and_a_download_script_that_is_never_run(tmp_path):
    (tmp_path / "d.yaml").write_text("train: x\nnames: {0: a, 1: b}\ndownload: |\n  import os\n  os.abort()\n")
    spec = load_data_spec(str(tmp_path / "d.yaml"))
    assert spec.names == ("a", "b") and spec.nc == 2 and spec.download == ()


def test_roots_folders_lists_and_lists_of_them(tmp_path, monkeypatch):
    make_set(tmp_path / "sets" / "mine", {"a": "0 0.5 0.5 0.1 0.1", "b": "1 0.5 0.5 0.1 0.1"})
    cv2.imwrite(str(tmp_path / "sets/mine/c.png"), np.zeros((9, 9, 3), np.uint8))
    (tmp_path / "sets/mine/list.txt").write_text(f"./images/train/b.png\n\n{tmp_path}/sets/mine/c.png\nimages/train/b.png\n")
    (tmp_path / "y").mkdir()
    (tmp_path / "y/d.yaml").write_text("path: ../datasets/mine\ntrain: list.txt\nval: [images/train, list.txt]\nnames: [a, b]\n")
    monkeypatch.delenv("YOLO_DATASETS", raising=False)
    spec = load_data_spec(str(tmp_path / "y/d.yaml"), str(tmp_path / "sets"))
    assert spec.root == tmp_path / "sets" / "mine"
    assert [Path(p).name for p in load_split(spec, "train", progress=False).images] == ["b.png", "c.png"]
    assert [Path(p).name for p in load_split(spec, "val", progress=False).images] == ["a.png", "b.png", "c.png"]
    monkeypatch.setenv("YOLO_DATASETS", str(tmp_path / "sets"))
    assert load_data_spec(str(tmp_path / "y/d.yaml")).root == spec.root


def test_a_missing_set_lists_every_place_and_the_mend(tmp_path, monkeypatch):
    monkeypatch.delenv("YOLO_DATASETS", raising=False)
    (tmp_path / "d.yaml").write_text("path: gone\ntrain: images\nnames: [a]\ndownload: https://example.org/x.zip\n")
    with pytest.raises(UserError) as error:
        load_split(load_data_spec(str(tmp_path / "d.yaml"), str(tmp_path / "sets")), "train")
    for words in (f"{tmp_path}/gone/images", f"{tmp_path}/sets/gone/images", "python -m utils.data.download --data d.yaml"):
        assert words in str(error.value)
    with pytest.raises(UserError, match=r"no val: entry"):
        load_split(load_data_spec(str(tmp_path / "d.yaml")), "val")


def test_empty_sets(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "d.yaml").write_text("path: .\ntrain: images\nnames: [a]\n")
    with pytest.raises(UserError, match="no images in"):
        load_split(load_data_spec(str(tmp_path / "d.yaml")), "train")
    (tmp_path / "l.txt").write_text("\n")
    for kind in ("yolo", "voc"):
        (tmp_path / "d.yaml").write_text(f"path: .\nformat: {kind}\ntrain: l.txt\nnames: [a]\n")
        with pytest.raises(UserError, match="no images in"):
            load_split(load_data_spec(str(tmp_path / "d.yaml")), "train")
    with pytest.raises(UserError, match="no label file for any of 2 images"):
        scan(tmp_path / "2", {"a": None, "b": None})
    assert scan(tmp_path / "3", {"a": ""}).report.backgrounds == 1


def test_data_modules_answer_help_without_torch():
    code = "import sys; import utils.data.labels, utils.data.check, utils.data.download; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0


@pytest.mark.parametrize(("name", "counts"), [
    ("bccd", {"train": (205, 2804), "val": (87, 1137), "test": (72, 945)}), ("coco128.yaml", {"train": (128, 929), "val": (128, 929)})])
def test_real_sets(shared, name, counts):
    spec = load_data_spec(name, str(shared / "datasets"))
    for split, (images, boxes) in counts.items():
        data = load_split(spec, split, cache=False, progress=False)
        assert (data.report.images, data.report.boxes, data.report.problems) == (images, boxes, ())
        expected = np.loadtxt(label_path(data.images[0], "labels"), ndmin=2, dtype=np.float64)
        np.testing.assert_allclose(data.boxes[0], expected, atol=1e-6)  # dust beyond the edges is cut
    if name == "bccd":  # red cells outnumber the others by far
        classes = np.concatenate(data.boxes)[:, 0].astype(int)
        assert spec.names[np.bincount(classes).argmax()] == "RBC"
    assert os.path.isabs(data.images[0])
