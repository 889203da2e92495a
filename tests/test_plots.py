"""Pictures by what must hold of their pixels; each was looked at besides."""
from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.draw import Tile, draw_boxes, image_grid, palette, save_image
from utils.errors import UserError
from utils.evaluate.coco import Detections, Truth
from utils.evaluate.curves import Curves, curves
from utils.plots.curves import plot_confusion, plot_metric_curve, plot_pr_curve
from utils.plots.figures import plain
from utils.plots.training import plot_labels, plot_results

RED = (0, 0, 255)
HEADER = ("epoch,time_s,train/box_loss,train/obj_loss,train/cls_loss,val/box_loss,val/obj_loss,val/cls_loss,metrics/precision,metrics/recall,"
          "metrics/mAP_0.5,metrics/mAP_0.5:0.95,x/lr0,x/lr1,x/lr2")


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, (height, width, 3), dtype=np.uint8)


def changed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    return (before != after).any(2)


def some_curves(num_classes: int) -> Curves:
    rng = np.random.default_rng(0)
    corner = rng.random((4 * num_classes, 2)) * 900
    boxes, cls = np.concatenate((corner, corner + 50), 1), np.arange(4 * num_classes) % num_classes
    return curves([Truth(boxes, cls)], [Detections(boxes + rng.normal(0, 6, boxes.shape), rng.random(len(cls)), cls)], num_classes)


def size_of(path: Path) -> tuple[int, int]:
    """Height and width of a picture that must not be blank."""
    image = cv2.imread(str(path))
    assert image is not None and image.std() > 1
    return image.shape[:2]


# boxes on images


def test_palette_has_distinct_colours() -> None:
    colors = np.array([palette(i) for i in range(80)], int)
    assert ((colors >= 0) & (colors <= 255)).all()
    distance = np.abs(colors[:, None] - colors[None]).sum(2) + 1000 * np.eye(80, dtype=int)
    assert distance.min() > 10
    assert distance[:20, :20].min() > 40
    assert palette(0) == (0x00, 0x5E, 0xD5)  # Okabe-Ito vermilion, as BGR


@pytest.mark.parametrize("line_width", [1, 2, 3, 6])
def test_a_box_without_label_changes_its_line_only(line_width: int) -> None:
    image = noise(200, 300)
    drawn = draw_boxes(image, np.array([[50, 60, 220, 150]]), [""], [RED], line_width)
    near = line_width // 2 + 1
    frame = np.zeros((200, 300), bool)
    frame[60 - near : 150 + near + 1, 50 - near : 220 + near + 1] = True
    frame[60 + near + 1 : 150 - near, 50 + near + 1 : 220 - near] = False
    assert not changed(image, drawn)[~frame].any()
    assert (drawn[60, 50:221] == RED).all() and (drawn[60:151, 220] == RED).all()


@pytest.mark.parametrize(("height", "width"), [(16, 16), (48, 400), (480, 640), (2000, 1500)])
def test_label_stays_inside_and_the_input_as_it_was(height: int, width: int) -> None:
    image = noise(height, width)
    before = image.copy()
    boxes = np.array([[-20, -20, 5, 5], [width - 3, height - 3, width + 50, height + 50], [0, 0, width, height]])
    drawn = draw_boxes(image, boxes, ["traffic light 0.93"] * 3, [palette(i) for i in range(3)])
    assert (image == before).all() and drawn.shape == image.shape and drawn.dtype == np.uint8
    assert changed(image, drawn).any()


@pytest.mark.parametrize("xyxy", [np.zeros((0, 4)), np.zeros(0), []])
def test_no_boxes_leave_the_image(xyxy: np.ndarray) -> None:
    image = noise(40, 50)
    drawn = draw_boxes(image, xyxy, [], [])
    assert (drawn == image).all() and drawn is not image


def test_label_sits_on_the_box_or_inside_where_there_is_no_room() -> None:
    image = np.zeros((300, 300, 3), np.uint8)
    above = changed(image, draw_boxes(image, np.array([[100, 100, 200, 200]]), ["x"], [RED], 2))
    assert above[:98, 100].any() and not above[110:190, 110:190].any()
    inside = changed(image, draw_boxes(image, np.array([[100, 0, 200, 200]]), ["x"], [RED], 2))
    assert inside[5, 105]


@pytest.mark.parametrize(("color", "dark"), [((255, 255, 255), True), ((0, 255, 255), True), ((120, 0, 0), False), ((0, 0, 0), False)])
def test_letters_contrast_with_their_tab(color: tuple[int, int, int], dark: bool) -> None:
    drawn = draw_boxes(np.full((200, 400, 3), 128, np.uint8), np.array([[50, 80, 390, 190]]), ["MMMM"], [color], 4)
    tab = drawn[60:75, 52:100].reshape(-1, 3).astype(int)
    ink = np.abs(tab - (24 if dark else 255)).sum(1) < 12
    assert ink.any() and (np.abs(tab - color).sum(1) < 3).any()


def test_the_first_box_lies_on_top() -> None:
    image = np.zeros((100, 100, 3), np.uint8)
    drawn = draw_boxes(image, np.array([[10, 10, 90, 90]] * 2), ["", ""], [RED, (255, 0, 0)], 2)
    assert (drawn[10, 10:90] == RED).all()


def test_names_beyond_ascii_and_non_contiguous_images() -> None:
    image = noise(200, 300)[:, ::-1]
    drawn = draw_boxes(image, np.array([[30, 80, 200, 190]]), ["Fußgänger 公交车"], [RED])
    assert changed(image, drawn).any()


def test_a_file_name_that_is_no_utf8(tmp_path: Path) -> None:
    """OpenCV's own answer to it is a segmentation fault."""
    image_grid([Tile(noise(60, 100), np.array([[10, 10, 50, 50]]), ["caf\udce9"], [RED], "caf\udce9.jpg")], tmp_path / "grid.png")
    assert size_of(tmp_path / "grid.png")


@pytest.mark.parametrize("count", [1, 3, 20])
def test_image_grid(tmp_path: Path, count: int) -> None:
    tiles = [Tile(noise(60 + 10 * i, 100), np.array([[10, 10, 50, 50]]), ["a"], [RED], f"image {i} " + "x" * 200) for i in range(count)]
    image_grid(tiles, tmp_path / "grid.png", max_tiles=4, max_size=400)
    height, width = size_of(tmp_path / "grid.png")
    assert height <= 400 and width <= 400
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]
    image_grid(tiles[:4], tmp_path / "four.png", max_size=400)
    assert (tmp_path / "four.png").read_bytes() == (tmp_path / "grid.png").read_bytes()


def test_image_grid_in_pairs_and_of_nothing(tmp_path: Path) -> None:
    image_grid([Tile(np.full((50, 50, 3), 9, np.uint8), np.zeros((0, 4)), [], [])] * 6, tmp_path / "pairs.png", columns=2, max_size=600)
    height, width = size_of(tmp_path / "pairs.png")
    assert height > width
    image_grid([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_save_image(tmp_path: Path) -> None:
    save_image(tmp_path / "ünï.png", noise(8, 9))
    assert (cv2.imdecode(np.fromfile(tmp_path / "ünï.png", np.uint8), cv2.IMREAD_COLOR) == noise(8, 9)).all()
    with pytest.raises(UserError, match=r"name it \.jpg or \.png"):
        save_image(tmp_path / "a.txt", noise(8, 9))
    assert [p.name for p in tmp_path.iterdir()] == ["ünï.png"]


# Matplotlib


@pytest.mark.parametrize("num_classes", [3, 25])
def test_curves_of_a_validation(tmp_path: Path, num_classes: int) -> None:
    result, names = some_curves(num_classes), ["_a $x$ name", *(f"класс {i}" for i in range(1, num_classes))]
    plot_pr_curve(result, names, tmp_path / "pr.png")
    plot_metric_curve(result, "f1", names, tmp_path / "f1.png")
    assert size_of(tmp_path / "pr.png") and size_of(tmp_path / "f1.png")


def test_curves_without_truth(tmp_path: Path) -> None:
    nothing = curves([], [], 2)
    plot_metric_curve(nothing, "recall", ["a", "b"], tmp_path / "r.png")
    assert size_of(tmp_path / "r.png")


@pytest.mark.parametrize("num_classes", [1, 40])
def test_confusion(tmp_path: Path, num_classes: int) -> None:
    plot_confusion(np.eye(num_classes + 1, dtype=int), [f"class {i}" for i in range(num_classes)], tmp_path / "full.png")
    assert size_of(tmp_path / "full.png")


def test_confusion_of_nothing(tmp_path: Path) -> None:
    plot_confusion(np.zeros((3, 3), int), ["名前", "$x_"], tmp_path / "empty.png")
    assert size_of(tmp_path / "empty.png")


@pytest.mark.parametrize(
    "text",
    [
        f"{HEADER}\n" + "\n".join(",".join([str(i), *(["0.5"] * 14)]) for i in range(12)),
        f"{HEADER}\n0" + ",0.1" * 14,
        "   epoch,   train/box_loss, metrics/mAP_0.5\n  0, 0.1,\n  1, nan, oops\n  2, 0.3, 0.4\n",
        "train/box_loss,other\n0.3,1\n0.2\n0.1,2,3,4\n",
    ],
    ids=["full", "one epoch", "spaces and gaps", "no epoch, ragged"],
)
def test_results(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.csv").write_text(text)
    plot_results(tmp_path / "results.csv", tmp_path / "results.png")
    assert size_of(tmp_path / "results.png")


@pytest.mark.parametrize("text", ["", HEADER, "epoch,loss\n1,2\n", "train/box_loss\nx\n", b"\xff\xfe\x00", None])
def test_results_with_nothing_to_plot(tmp_path: Path, text: str | bytes | None) -> None:
    if text is not None:
        (tmp_path / "results.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError, match=r"results\.csv"):
        plot_results(tmp_path / "results.csv", tmp_path / "results.png")
    assert not (tmp_path / "results.png").exists()


@pytest.mark.parametrize("images", [(), (0, 1, 7, 90)])
def test_labels(tmp_path: Path, images: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    labels = [np.c_[rng.integers(0, 40, n), rng.random((n, 4))] for n in images]
    plot_labels(labels, [f"class {i}" for i in range(40)], tmp_path / "labels.jpg")
    assert size_of(tmp_path / "labels.jpg")


def test_plain() -> None:
    assert plain("car") == "car"
    assert plain("_a$b$") == r" _a\$b\$"
    assert plain("x" * 30, 5) == "xxxx…"


def test_a_failed_picture_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        plot_confusion(np.eye(2, dtype=int), ["a"], tmp_path / "confusion.unknown")
    assert list(tmp_path.iterdir()) == []
