"""val.py and what it is made of: boxes that go back exactly, a mAP that pycocotools agrees with, and every flag."""
from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import data_yaml, picture_split, tiny_model
from torch import Tensor

import val
from models.yolo import load_model
from utils.boxes import xyxy_to_cxcywh
from utils.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from utils.config import ValConfig
from utils.data.open import open_splits, val_loader
from utils.errors import UserError
from utils.evaluate.matching import Detections
from utils.evaluate.official import cocoeval
from utils.evaluate.output import _unique, yolo_lines
from utils.evaluate.tta import Augmented
from utils.evaluate.validate import check_classes, truth_of, validate
from utils.hyp import Hyp
from utils.training.loss import DetectionLoss

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(place: Path) -> Path:
    model = tiny_model(place)
    with torch.no_grad():
        for conv in model.head.m:
            conv.bias.view(model.head.num_anchors, -1)[:, 4:] += 4  # an untrained network that is sure of itself: boxes at any threshold
    save_checkpoint(place / "tiny.pt", Checkpoint(model.spec.to_dict(), model.names, dict(model.state_dict())))
    return place / "tiny.pt"


@pytest.fixture(scope="module")
def flags(place: Path, weights: Path) -> list[str]:
    return ["--weights", str(weights), "--data", str(data_yaml(place)), "--imgsz", "64", "--batch-size", "3", "--device", "cpu", "--workers", "0",
            "--precision", "fp32", "--noplots", "--project", str(place / "runs")]


def run(flags: list[str], *extra: str, name: str) -> Path:
    assert val.main([*flags, "--name", name, *extra]) == 0
    return Path(flags[flags.index("--project") + 1]) / name


@pytest.mark.parametrize(("trained_at", "flag", "used"), [(64, (), 64), (96, (), 96), (None, (), 640), (96, ("--imgsz", "60"), 64)])
def test_image_size_is_the_checkpoints_own(trained_at, flag, used, flags, place, weights, capfd):
    """A size that differs from training's costs accuracy silently."""
    save_checkpoint(place / "sized.pt", dataclasses.replace(load_checkpoint(weights), imgsz=trained_at))
    at = flags.index("--imgsz")
    assert val.main([*flags[:at], *flags[at + 2 :], *flag, "--weights", str(place / "sized.pt"), "--task", "speed"]) == 0
    assert f"at {used} px" in "".join(capfd.readouterr())


def pycocotools_ap(labels: list[Path], images: list[Path], predictions: Path, nc: int) -> tuple[float, float]:
    """AP and AP50 of a results JSON against YOLO label files, converted here."""
    truth = {"images": [], "annotations": [], "categories": [{"id": k} for k in range(nc)]}
    for label, image in zip(labels, images, strict=True):
        width, height = Image.open(image).size
        truth["images"].append({"id": int(image.stem)})
        for line in label.read_text().splitlines() if label.exists() else ():
            cls, cx, cy, w, h = (np.float32(v).astype(float) for v in line.split())
            box = [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
            truth["annotations"].append({"id": len(truth["annotations"]) + 1, "image_id": int(image.stem), "category_id": int(cls), "bbox": box,
                                         "area": box[2] * box[3], "iscrowd": 0})
    return cocoeval(truth, predictions)


def printed_map(out: str) -> tuple[float, float]:
    """mAP50-95 and mAP50 of the table's first row."""
    row = next(line.split() for line in out.splitlines() if line.split()[:1] == ["all"])
    return float(row[-1]), float(row[-2])


class Oracle:
    """A network that finds just what the labels say: it reads the batches' own targets."""

    def __init__(self, batches: list, nc: int) -> None:
        self.batches, self.nc = iter(batches), nc

    def __call__(self, images: Tensor) -> Tensor:
        batch = next(self.batches)
        assert batch.images.shape == images.shape and images.max() <= 1
        height, width = images.shape[2:]
        found = torch.zeros(len(images), max(len(batch.targets), 1), 5 + self.nc)
        for row, (image, cls, *box) in enumerate(batch.targets.tolist()):
            found[int(image), row, :4] = torch.tensor(box) * torch.tensor([width, height, width, height])
            found[int(image), row, 4] = found[int(image), row, 5 + int(cls)] = 1
        return found

    def decode(self, outputs: Tensor) -> Tensor:
        return outputs


def test_boxes_come_back_to_the_original_pixels(tmp_path: Path) -> None:
    """Of a network that is right in the padded image, every box is right in its own image: mAP 1, and corners to a hundredth of a pixel."""
    split = picture_split(tmp_path, [(64, 64), (97, 41), (41, 97), (640, 333), (31, 20), (128, 60), (333, 640)])
    loader = val_loader(split, 96, 3, 32, 0, CPU)
    result = validate(Oracle(list(loader), 2), loader, split, CPU, torch.float32)
    assert result.scores.ap == pytest.approx(1) and result.fitness == pytest.approx(1) and result.loss is None
    assert sorted(result.indices) == list(range(7))
    for index, truth, found in zip(result.indices, result.truths, result.detections, strict=True):
        own = truth_of(split, index)
        np.testing.assert_array_equal(own.xyxy, truth.xyxy)
        order, mine = np.lexsort(truth.xyxy.T), np.lexsort(found.xyxy.T.round(1))
        np.testing.assert_allclose(found.xyxy[mine], truth.xyxy[order], atol=0.01)
        np.testing.assert_array_equal(found.cls[mine], truth.cls[order])
    assert result.metrics() == pytest.approx({"precision": 1, "recall": 1, "f1": 1, "mAP50": 1, "mAP50-95": 1}, abs=1e-3)


def test_equal_confidences_come_by_image_id_as_in_pycocotools(tmp_path: Path) -> None:
    split = picture_split(tmp_path, [(64, 64)] * 4)
    split = dataclasses.replace(split, image_ids=(30, 4, 200, 1))
    loader = val_loader(split, 64, 3, 32, 0, CPU)
    assert validate(Oracle(list(loader), 2), loader, split, CPU, torch.float32).indices == (3, 1, 0, 2)


class Slow(Oracle):
    def __call__(self, images: Tensor) -> Tensor:
        time.sleep(0.02)
        return super().__call__(images)


def test_a_thread_without_work_does_not_make_an_image_faster(tmp_path: Path) -> None:
    """A batch of one image is one thread's work, however many there are."""
    torch.set_num_threads(2)
    loader = val_loader(picture_split(tmp_path, [(64, 64)] * 3), 64, 1, 32, 0, CPU)
    split = picture_split(tmp_path / "again", [(64, 64)] * 3)
    assert validate(Slow(list(loader), 2), loader, split, CPU, torch.float32).speed.inference >= 20


def test_threads_change_no_box(tmp_path: Path) -> None:
    """Threads share out a batch's images; what is found on each stays, and its order."""
    split = picture_split(tmp_path, [(64, 64), (97, 41), (41, 97), (64, 33), (31, 20)])
    model = tiny_model(tmp_path).fused()
    criterion = DetectionLoss(model.head.anchors, 2, Hyp(), 64)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(validate(model, val_loader(split, 64, 4, 32, 0, CPU), split, CPU, torch.float32, criterion=criterion))
        assert torch.get_num_threads() == threads
    alone, shared_out = results
    assert alone.indices == shared_out.indices and alone.loss.shape == (3,) and (shared_out.loss > 0).all()
    for a, b in zip(alone.detections, shared_out.detections, strict=True):
        assert len(a.conf) == len(b.conf) > 0
        np.testing.assert_allclose(a.conf, b.conf, atol=1e-6)
        np.testing.assert_allclose(a.xyxy, b.xyxy, atol=1e-3)
    assert alone.scores.ap == pytest.approx(shared_out.scores.ap, abs=1e-9)


def test_single_class_counts_every_class_as_one(tmp_path: Path) -> None:
    split = picture_split(tmp_path, [(64, 64)] * 3)
    loader = val_loader(split, 64, 3, 32, 0, CPU)
    wrong = list(loader)
    wrong[0].targets[:, 1] = 1 - wrong[0].targets[:, 1]
    assert validate(Oracle(wrong, 2), loader, split, CPU, torch.float32).scores.ap == 0
    one = split.__class__(**{**vars(split), "names": ("item",), "boxes": tuple(b * (0, 1, 1, 1, 1) for b in split.boxes)})
    result = validate(Oracle(wrong, 2), val_loader(one, 64, 3, 32, 0, CPU), one, CPU, torch.float32, single_cls=True)
    assert result.scores.ap == pytest.approx(1)


def test_map_equals_pycocotools_on_its_json(flags: list[str], place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = run(flags, "--save-json", name="json")
    labels = sorted((place / "labels" / "val").glob("*.txt"))
    ap, ap50 = pycocotools_ap(labels, sorted((place / "images" / "val").glob("*.png")), folder / "predictions.json", 2)
    assert printed_map(capfd.readouterr().out) == (round(ap, 4), round(ap50, 4)) and ap50 > 0
    options = ValConfig(data=flags[3])
    (split,) = open_splits(options, ("val",))
    model = load_model(flags[1]).fused().to(memory_format=torch.channels_last)
    result = validate(model, val_loader(split, 64, 3, 32, 0, CPU), split, CPU, torch.float32)
    assert (result.scores.ap, result.scores.ap50) == pytest.approx((ap, ap50), abs=1e-6)


def subset(shared: Path, folder: Path, count: int) -> tuple[list[Path], list[Path]]:
    """The first `count` images of coco128 as a set of their own; label files and images."""
    images = sorted((shared / "datasets" / "coco128" / "images" / "train2017").glob("*.jpg"))[:count]
    (folder / "list.txt").write_text("\n".join(map(str, images)))
    names = (Path(val.__file__).parent / "data" / "coco128.yaml").read_text().split("names:")[1].split("]")[0] + "]"
    (folder / "few.yaml").write_text(f"path: {folder}\ntrain: list.txt\nval: list.txt\nnames:{names}\n")
    return [Path(str(i).replace("images", "labels")).with_suffix(".txt") for i in images], images


def test_yolov5n_on_photographs_equals_pycocotools(shared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    labels, images = subset(shared, tmp_path, 8)
    argv = ["--weights", str(shared / "weights" / "yolov5n.pt"), "--data", str(tmp_path / "few.yaml"), "--imgsz", "320", "--batch-size", "4",
            "--workers", "0", "--device", "cpu", "--precision", "fp32", "--save-json", "--noplots", "--project", str(tmp_path)]
    assert val.main(argv) == 0
    out = capfd.readouterr().out
    ap, ap50 = pycocotools_ap(labels, images, tmp_path / "exp" / "predictions.json", 80)
    assert printed_map(out) == pytest.approx((ap, ap50), abs=5.1e-5) and ap > 0.2
    exact = re.search(r"here: ([\d.]+), ([\d.]+)", out)
    assert exact and (float(exact[2]), float(exact[1])) == pytest.approx((ap, ap50), abs=1.1e-6)


@pytest.mark.slow
def test_yolov5n_on_coco128_reaches_the_published_figures(shared: Path, tmp_path: Path) -> None:
    """AP 0.309, AP50 0.470 by pycocotools on the boxes (the published weights; 640 px, confidence 0.001, IoU 0.6, 300 boxes)."""
    labels, images = subset(shared, tmp_path, 128)
    argv = ["--weights", str(shared / "weights" / "yolov5n.pt"), "--data", str(tmp_path / "few.yaml"), "--batch-size", "16", "--device", "cpu",
            "--precision", "fp32", "--save-json", "--noplots", "--project", str(tmp_path)]
    assert val.main(argv) == 0
    assert pycocotools_ap(labels, images, tmp_path / "exp" / "predictions.json", 80) == pytest.approx((0.309, 0.470), abs=0.002)


# flags


def test_tasks(flags: list[str], place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    counts = {}
    for task in ("train", "val", "test", "speed"):
        folder = run(flags, "--task", task, name=task)
        assert folder.exists() == (task != "speed"), "speed leaves no folder"
        out = capfd.readouterr().out
        counts[task] = next(line.split()[1] for line in out.splitlines() if line.split()[:1] == ["all"])
        assert re.search(r"speed: .* ms inference, .* ms NMS an image at 64 px, batch 3", out)
    assert counts == {"train": "6", "val": "4", "test": "4", "speed": "4"}
    run(flags, "--task", "speed", "--save-json", name="speed")
    assert "--task speed writes nothing" in capfd.readouterr().err


def test_save_txt_and_conf(flags: list[str], place: Path) -> None:
    """The text files hold the JSON's boxes, normalised."""
    folder = run(flags, "--save-txt", "--save-conf", "--save-json", name="txt")
    plain = run(flags, "--save-txt", name="plain")
    rows = json.loads((folder / "predictions.json").read_text())
    assert {row["image_id"] for row in rows} == {0, 1, 2, 3} and {row["category_id"] for row in rows} <= {0, 1}
    for image in sorted((place / "images" / "val").glob("*.png")):
        width, height = Image.open(image).size
        written = np.loadtxt(folder / "labels" / f"{image.stem}.txt", ndmin=2)
        mine = [r for r in rows if r["image_id"] == int(image.stem)]
        boxes = np.array([r["bbox"] for r in mine])
        np.testing.assert_array_equal(written[:, 0], [r["category_id"] for r in mine])
        np.testing.assert_allclose(written[:, 5], [r["score"] for r in mine], rtol=1e-5)
        centred = np.concatenate((boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]), 1)
        np.testing.assert_allclose(written[:, 1:5], centred / np.array([width, height] * 2), atol=1e-5)
        np.testing.assert_array_equal(np.loadtxt(plain / "labels" / f"{image.stem}.txt", ndmin=2), written[:, :5])


def test_thresholds(flags: list[str]) -> None:
    rows = lambda folder: json.loads((folder / "predictions.json").read_text())  # noqa: E731
    few = rows(run(flags, "--save-json", "--conf", "0.5", "--max-det", "3", name="few"))
    assert few and len(few) <= 4 * 3 and min(row["score"] for row in few) > 0.5
    folder = run(flags, "--save-json", "--save-txt", "--conf", "1", name="none")
    assert rows(folder) == [] and not (folder / "labels").exists()
    assert len(rows(run(flags, "--save-json", "--iou", "0.1", name="strict"))) < len(rows(run(flags, "--save-json", "--iou", "0.9", name="loose")))


def test_single_cls_verbose_augment_bf16(flags: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    run(flags, "--verbose", name="verbose")
    assert {"all", "red", "green"} <= {line.split()[0] for line in capfd.readouterr().out.splitlines() if line.strip()}
    folder = run(flags, "--single-cls", "--save-json", "--verbose", name="single")
    assert {row["category_id"] for row in json.loads((folder / "predictions.json").read_text())} == {0}
    assert not [line for line in capfd.readouterr().out.splitlines() if line.strip().startswith(("red", "green"))]
    rows = lambda *given, name: json.loads((run(flags, "--save-json", *given, name=name) / "predictions.json").read_text())  # noqa: E731
    plain, augmented, coarse = rows(name="before"), rows("--augment", name="augment"), rows("--precision", "bf16", name="bf16")
    best = lambda found: max(row["score"] for row in found)  # noqa: E731
    assert augmented and [row["score"] for row in augmented] != [row["score"] for row in plain]
    assert best(coarse) != best(plain) and best(coarse) == pytest.approx(best(plain), abs=0.02)


def test_pictures(flags: list[str]) -> None:
    folder = run([f for f in flags if f != "--noplots"], name="pictures")
    names = {"PR_curve.png", "P_curve.png", "R_curve.png", "F1_curve.png", "confusion_matrix.png", "val_batch0.jpg"}
    assert names <= {p.name for p in folder.iterdir()}


def test_mistakes_are_one_line(flags: list[str], place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    three = tiny_model(place, names=("a", "b", "c"))
    save_checkpoint(place / "three.pt", Checkpoint(three.spec.to_dict(), three.names, dict(three.state_dict())))
    (place / "no_test.yaml").write_text((place / "tiny_data.yaml").read_text().replace("test: images/test\n", ""))
    (place / "blocked").write_text("")
    cases = [
        (["--weights", str(place / "three.pt")], "three.pt: knows 3 classes, the data has 2"),
        (["--weights", "nowhere.pt"], "nowhere.pt: no such weights file"),
        (["--data", "nowhere.yaml"], "nowhere.yaml: no such data YAML"),
        (["--data", str(place / "no_test.yaml"), "--task", "test"], "no_test.yaml: has no test: entry"),
        (["--half"], "needs a CUDA device"),
        (["--conf", "2"], "--conf-thres 2.0: must be between 0 and 1"),
        (["--project", str(place / "blocked")], "blocked"),
    ]
    for extra, message in cases:
        capfd.readouterr()
        assert val.main([*flags, *extra]) == 2, extra
        err = [line for line in capfd.readouterr().err.splitlines() if line.startswith(("error:", "Traceback"))]
        assert len(err) == 1 and message in err[0], err


# pieces


def test_check_classes(capfd: pytest.CaptureFixture[str]) -> None:
    check_classes(("a", "b"), ("a", "b"), False, "w.pt")
    check_classes(("a", "b"), ("item",), True, "w.pt")
    assert capfd.readouterr().err == ""
    check_classes(("a", "b", "c"), ("a", "x", "y"), False, "w.pt")
    assert "class 1 is named b there and x in the data" in capfd.readouterr().err
    with pytest.raises(UserError, match=r"w.pt: knows 1 classes, the data has 2"):
        check_classes(("a",), ("a", "b"), False, "w.pt")


def test_yolo_lines_by_hand() -> None:
    found = Detections(np.array([[10.0, 20, 30, 60], [0, 0, 100, 200]]), np.array([0.5, 0.25]), np.array([3, 0]))
    assert yolo_lines(found, np.array([100, 200]), True) == "3 0.2 0.2 0.2 0.2 0.5\n0 0.5 0.5 1 1 0.25\n"
    assert yolo_lines(found, np.array([100, 200]), False) == "3 0.2 0.2 0.2 0.2\n0 0.5 0.5 1 1\n"
    assert yolo_lines(Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int)), np.array([1, 1]), True) == ""


class FindsWhite:
    """A network that boxes what is white, at whatever scale it is shown."""

    def __init__(self, max_stride: int) -> None:
        self.max_stride, self.seen = max_stride, []

    def __call__(self, images: Tensor) -> Tensor:
        self.seen.append(tuple(images.shape[2:]))
        y, x = (images[0, 0] > 0.75).nonzero(as_tuple=True)
        box = torch.stack((x.min(), y.min(), x.max() + 1, y.max() + 1)).float()
        return torch.cat((xyxy_to_cxcywh(box), torch.ones(2))).view(1, 1, 6)

    def decode(self, outputs: Tensor) -> Tensor:
        return outputs


def test_label_files_of_images_of_one_name():
    """By the order of the split; nobody takes the number that is another's name."""
    assert _unique(["a", "b", "a", "a_2", "a"]) == ["a", "b", "a_3", "a_2", "a_4"]
    assert _unique(["a", "A", "A_2"]) == ["a", "A_3", "A_2"]  # one file on many disks


@pytest.mark.parametrize("stride", [32, 64])
def test_augmented_looks_agree(stride: int) -> None:
    """Three scales, one mirrored: each look's box comes back to the same place, from inputs that the network's strides divide."""
    image = torch.zeros(1, 3, 256, 320)
    image[..., 40:140, 200:300] = 1
    network = FindsWhite(stride)
    augmented = Augmented(network)
    boxes = augmented.decode(augmented(image))
    assert boxes.shape == (1, 3, 6)
    torch.testing.assert_close(boxes[0, :, :4], torch.tensor([[250.0, 90, 100, 100]]).expand(3, 4), atol=2.5, rtol=0)
    whole = lambda side, scale: math.ceil(side * scale / stride) * stride  # noqa: E731
    assert network.seen == [(256, 320), *((whole(256, s), whole(320, s)) for s in (0.83, 0.67))]


def test_augmented_works_with_strides_of_64(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, levels=5).eval()
    augmented = Augmented(model)
    with torch.inference_mode():
        boxes = augmented.decode(augmented(torch.rand(2, 3, 128, 192)))
        assert boxes.shape[0] == 2 and boxes.shape[1] > model.decode(model(torch.rand(1, 3, 128, 192))).shape[1] * 2
