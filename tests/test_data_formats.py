"""COCO JSON, Pascal VOC and VisDrone read directly; pycocotools and boxes worked by hand are the oracles."""
from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from utils.data.labels import load_split
from utils.data.spec import load_data_spec
from utils.errors import UserError


def image(path: Path, width: int, height: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.zeros((height, width, 3), np.uint8))


def load(root: Path, yaml: str, split: str = "train"):
    (root / "d.yaml").write_text(yaml)
    return load_split(load_data_spec(str(root / "d.yaml")), split, progress=False)


# --- COCO --------------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def coco(tmp_path) -> Path:
    """12 images, category ids with gaps in no order, annotations of all images mixed, some crowds."""
    rng = np.random.default_rng(0)
    images = [{"id": 100 - n, "file_name": f"sub/{n}.png", "width": 40 + n, "height": 30} for n in range(12)]
    for item in images:
        image(tmp_path / "pics" / item["file_name"], item["width"], item["height"])
    annotations = []
    for n in range(60):
        of = images[rng.integers(0, 11)]  # the last one stays empty
        x, y, w, h = rng.uniform((0, 0, 2, 2), (20, 15, 19, 14))
        annotations.append({"id": n, "image_id": of["id"], "category_id": int(rng.choice([9, 2, 55])), "bbox": [x, y, w, h],
                            "area": w * h * 0.7, "iscrowd": int(n % 10 == 0)})
    categories = [{"id": 9, "name": "dog"}, {"id": 2, "name": "zebra"}, {"id": 55, "name": "owl"}]
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann" / "train.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return tmp_path


YAML = "format: coco\ntrain: ann/train.json\nimages: pics\n"


def test_coco_equals_pycocotools(coco):
    split = load(coco, YAML)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(coco / "ann" / "train.json"))
    assert split.names == ("zebra", "dog", "owl") and split.category_ids == (2, 9, 55) and split.image_ids == tuple(range(100, 88, -1))
    assert split.report.backgrounds >= 1 and split.report.crowds == 6 and split.report.boxes == 54
    for n, key in enumerate(split.image_ids):
        assert split.images[n] == str(coco / "pics" / truth.imgs[key]["file_name"])
        for crowd, boxes, areas in ((0, split.boxes[n], split.areas[n]), (1, split.crowds[n], split.crowd_areas[n])):
            expected = truth.loadAnns(truth.getAnnIds([key], iscrowd=crowd))
            wh = boxes[:, 3:] * split.sizes[n]
            categories = np.array(split.category_ids)[boxes[:, 0].astype(int)]
            mine = np.column_stack((boxes[:, 1:3] * split.sizes[n] - wh / 2, wh, areas, categories))
            theirs = np.array([[*a["bbox"], a["area"], a["category_id"]] for a in expected]).reshape(-1, 6)
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-4)


def test_coco_from_the_cache_is_the_same(coco):
    first, again = load(coco, YAML), load(coco, YAML)
    assert list((coco / ".light-yolo").glob("*.npz"))
    for key, value in first.__dict__.items():
        assert str(getattr(again, key)) == str(value), key
    content = json.loads((coco / "ann/train.json").read_text())
    content["annotations"] = content["annotations"][:9]
    (coco / "ann/train.json").write_text(json.dumps(content))
    assert load(coco, YAML).report.boxes == 8


def test_coco_names_are_taken_from_the_json_or_checked(coco):
    (coco / "d.yaml").write_text(YAML)
    assert load_data_spec(str(coco / "d.yaml")).names == ("zebra", "dog", "owl")
    assert load(coco, YAML + "names: [zebra, dog, owl]\nnc: 3\n").names == ("zebra", "dog", "owl")
    with pytest.raises(UserError, match="dog for zebra"):
        load(coco, YAML + "names: [dog, zebra, owl]\n")


def test_coco_values_that_others_leave_out(coco):
    content = json.loads((coco / "ann/train.json").read_text())
    content["annotations"] = [{**content["annotations"][1], "area": None}]
    (coco / "ann/train.json").write_text(json.dumps(content))
    _, _, w, h = content["annotations"][0]["bbox"]
    assert np.concatenate(load(coco, YAML).areas) == pytest.approx([w * h])
    content["categories"][0]["id"] = "dog"
    (coco / "ann/train.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"train\.json: categories\[0\]: id 'dog' is not a whole number"):
        load(coco, YAML)


def test_coco_jsons_that_each_count_from_one(coco):
    (coco / "ann" / "more.json").write_text((coco / "ann" / "train.json").read_text().replace("sub/", "other/"))
    for n in range(12):
        image(coco / "pics" / "other" / f"{n}.png", 40 + n, 30)
    split = load(coco, YAML.replace("ann/train.json", "[ann/train.json, ann/more.json]"))
    assert len(set(split.image_ids)) == len(split.images) == 24
    content = json.loads((coco / "ann" / "more.json").read_text())
    for entry, key in ((entry, key) for part, key in (("images", "id"), ("annotations", "image_id")) for entry in content[part]):
        entry[key] = f"b{entry[key]}"
    (coco / "ann" / "more.json").write_text(json.dumps(content))
    mixed = load(coco, YAML.replace("ann/train.json", "[ann/train.json, ann/more.json]")).image_ids
    assert len({*map(type, mixed)}) == 1 and len(set(mixed)) == 24, "numbers and texts can't be put in one order"


@pytest.mark.parametrize(("change", "words"), [
    ({"category_id": 3}, "category_id 3 is not among"), ({"image_id": 1}, "image_id 1 is not among"), ({"bbox": [1, 2, 3]}, "is not [x, y"),
    ({"bbox": [1, 2, -3, 4]}, "negative"), ({"area": "large"}, "area 'large' is not a number"), ({"bbox": [float("nan"), 2, 3, 4]}, "not finite")])
def test_coco_mistakes_name_the_annotation(coco, change, words):
    content = json.loads((coco / "ann/train.json").read_text())
    content["annotations"][7] |= change
    (coco / "ann/train.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"train\.json: annotation 7: ") as error:
        load(coco, YAML)
    assert words in str(error.value)


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"images": [{}], "annotations": [], "categories": []}', '{"images": 1'])
def test_what_is_no_coco_json(coco, text):
    (coco / "ann/train.json").write_text(text)
    with pytest.raises(UserError, match=r"train\.json"):
        load(coco, YAML)


def test_coco_images_that_are_missing_are_broken_not_fatal(coco):
    (coco / "pics/sub/3.png").unlink()
    split = load(coco, YAML)
    assert split.report.broken == 1 and len(split.images) == len(split.image_ids) == 11 and 97 not in split.image_ids


# --- Pascal VOC --------------------------------------------------------------------------------------------------------------------------------

OBJECT = "<object><name>{}</name>{}<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
PART = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"


def write_voc(root: Path, stem: str, objects: list[str], size: str = "<size><width>40</width><height>20</height></size>") -> Path:
    image(root / "JPEGImages" / f"{stem}.png", 40, 20)
    xml = root / "Annotations" / f"{stem}.xml"
    xml.parent.mkdir(exist_ok=True)
    xml.write_text("\n".join(["<annotation>", size, *objects, "</annotation>"]))
    return xml


VOC = "format: voc\ntrain: ImageSets/Main/train.txt\nval: Annotations\nnames: [cat, dog]\n"


@pytest.fixture
def voc(tmp_path) -> Path:
    write_voc(tmp_path, "a", [OBJECT.format("dog", PART, 1, 1, 40, 20), OBJECT.format("cat", "<difficult>1</difficult>", 1, 1, 9, 9),
                              OBJECT.format("cat", "<difficult>0</difficult>", 11, 6, 20, 15)])
    write_voc(tmp_path, "b", [])
    write_voc(tmp_path, "c", [OBJECT.format("cat", "", 5, 5, 14, 14)], size="")
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text("\ufeffa\nb -1\n", encoding="utf-8")
    return tmp_path


def test_voc_boxes_count_from_one_and_include_the_last_pixel(voc):
    split = load(voc, VOC)
    assert [Path(p).name for p in split.images] == ["a.png", "b.png"] and split.report.difficult == 1 and split.report.backgrounds == 1
    # 11..20 of 40 columns: from 10/40 to 20/40; 6..15 of 20 rows: from 5/20 to 15/20
    np.testing.assert_allclose(split.boxes[0], [[1, 0.5, 0.5, 1, 1], [0, 0.375, 0.5, 0.25, 0.5]], atol=1e-7)
    split = load(voc, VOC, "val")  # the folder itself; c has no size, so its image's counts
    assert len(split.images) == 3
    np.testing.assert_allclose(split.boxes[2], [[0, 0.225, 0.45, 0.25, 0.5]], atol=1e-7)


def test_voc_stems_with_spaces(voc):
    write_voc(voc, "cell 001", [OBJECT.format("cat", "", 5, 5, 14, 14)])
    (voc / "ImageSets/Main/train.txt").write_text("cell 001\na  1\n")
    assert [Path(p).name for p in load(voc, VOC).images] == ["cell 001.png", "a.png"]


def test_labels_of_an_image_that_is_shown_turned(voc):
    """A tool that ignores EXIF writes the stored size."""
    write_voc(voc, "a", [OBJECT.format("cat", "", 5, 5, 14, 14)], "<size><width>20</width><height>40</height></size>")
    problems = load(voc, VOC).report.problems
    assert len(problems) == 1 and "a.png: labelled on 20x40, shown as 40x20: its boxes may be elsewhere" in problems[0]
    write_voc(voc, "a", [OBJECT.format("cat", "", 5, 5, 14, 14)], "<size><width>80</width><height>40</height></size>")
    assert not load(voc, VOC).report.problems  # another resolution


def test_coco_areas_follow_another_resolution(coco):
    before = load(coco, YAML)
    content = json.loads((coco / "ann/train.json").read_text())
    for entry in content["images"]:
        entry.update(width=2 * entry["width"], height=2 * entry["height"])
    for entry in content["annotations"]:
        entry.update(bbox=[2 * side for side in entry["bbox"]], area=4 * entry["area"])
    (coco / "ann/train.json").write_text(json.dumps(content))
    after = load(coco, YAML)
    for name in ("boxes", "areas", "crowd_areas"):
        np.testing.assert_allclose(np.concatenate(getattr(after, name)), np.concatenate(getattr(before, name)), rtol=1e-5)


@pytest.mark.parametrize(("text", "place", "words"), [
    (OBJECT.format("dgo", "", 1, 1, 2, 2), ":3:", "did you mean dog"),
    (OBJECT.format("dog", "", 9, 1, 2, 2), ":3:", "in order"),
    (OBJECT.format("dog", "", "nan", 1, 2, 2), ":3:", "finite"),
    ("<object><name>dog</name></object>", ":3:", "needs a name and a bndbox"),
    ("<object>", ":4:", "not valid XML")])
def test_voc_mistakes_name_file_and_line(voc, text, place, words):
    xml = write_voc(voc, "a", [text])
    with pytest.raises(UserError) as error:
        load(voc, VOC)
    assert f"{xml}{place}" in str(error.value) and words in str(error.value)


def test_voc_refuses_entities(voc):
    bomb = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>\n<annotation><object><name>&b;</name></object></annotation>'
    (voc / "Annotations/a.xml").write_text(bomb)
    with pytest.raises(UserError, match="DOCTYPE or ENTITY"):
        load(voc, VOC)


# --- VisDrone ----------------------------------------------------------------------------------------------------------------------------------


def test_visdrone(tmp_path):
    image(tmp_path / "images" / "a.png", 100, 50)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/a.txt").write_text("10,5,20,10,1,4,0,0\n0,0,9,9,0,0,0,0\n1,1,5,5,1,11,0,0\n90,40,20,10,1,10,0,1,\n0,0,10,10,1,1,0,0\n")
    names = ", ".join(f"n{i}" for i in range(10))
    split = load(tmp_path, f"format: visdrone\ntrain: images\nnames: [{names}]\n")
    np.testing.assert_allclose(split.boxes[0], [[3, 0.2, 0.2, 0.2, 0.2], [0, 0.05, 0.1, 0.1, 0.2]], atol=1e-7)
    assert split.report.dropped == 1 and "a.txt:4: dropped" in split.report.problems[0]
    (tmp_path / "annotations/a.txt").write_text("10,5,20\n")
    with pytest.raises(UserError, match=r"a\.txt:1: expected left,top"):
        load(tmp_path, f"format: visdrone\ntrain: images\nnames: [{names}]\n")


@pytest.mark.parametrize("name", ["shapes", "bccd", "coco128", "coco", "voc", "visdrone"])
def test_our_data_yamls_load(name, monkeypatch, tmp_path):
    monkeypatch.setattr("utils.data.spec.ensure_shapes", lambda root: root)
    spec = load_data_spec(f"{name}.yaml", str(tmp_path))
    assert spec.nc == {"shapes": 4, "bccd": 3, "coco128": 80, "coco": 80, "voc": 20, "visdrone": 10}[name]
    assert {"train", "val"} <= set(spec.splits) and (name == "shapes" or spec.root == tmp_path / name)
