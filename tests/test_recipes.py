"""docs/recipes.md: every program in it runs as it stands and does what it says."""
from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from models.detector import Detector
from utils.data.images import read_image

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
RECIPES = {title: code for title, code in re.findall(r"^## (.*?)$.*?^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)}
FRAMES = 12


def test_every_recipe_has_its_test():
    tested = {name for name in globals() if name.startswith("test_") and name != "test_every_recipe_has_its_test"}
    assert {re.sub(r"\W+", "_", title.lower()) for title in RECIPES} == {name.removeprefix("test_") for name in tested}
    for code in RECIPES.values():
        compile(code, "recipes.md", "exec")


@pytest.fixture(scope="module")
def place(shared, tmp_path_factory) -> Path:
    """The folder that the recipes speak of: weights, an image of 1920 x 1080, a video of a few frames."""
    place = tmp_path_factory.mktemp("recipes")
    shutil.copy(shared / "weights" / "yolov5n.pt", place / "best.pt")
    capture = cv2.VideoCapture(str(shared / "media" / "street.mp4"))
    writer = cv2.VideoWriter(str(place / "street.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 25, (1920, 1080))
    for n in range(FRAMES):
        frame = capture.read()[1]
        writer.write(frame)
        if n == 0:
            cv2.imwrite(str(place / "street.jpg"), frame)
    writer.release()
    return place


@pytest.fixture(scope="module")
def plain(place) -> int:
    """Objects in street.jpg above 0.3."""
    return len(Detector(place / "best.pt", "cpu")(place / "street.jpg", conf=0.3)[0])


def run(title: str, place: Path, *packages: str) -> str:
    """What the recipe prints, in `place`."""
    for package in packages:
        pytest.importorskip(package)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", RECIPES[title]], cwd=place, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_supervision_annotate(place):
    run("supervision: annotate", place, "supervision")
    before, after = read_image(place / "street.jpg"), read_image(place / "street_annotated.jpg")
    assert before.shape == after.shape and (abs(before.astype(int) - after) > 40).any(2).mean() > 0.002


@pytest.mark.slow
def test_supervision_track_and_count(place):
    said = run("supervision: track and count", place, "supervision", "trackers")
    people, inward, outward = map(int, re.fullmatch(r"(\d+) people, (\d+) in, (\d+) out\n", said).groups())
    assert 3 <= people <= 30 and inward + outward <= people
    capture = cv2.VideoCapture(str(place / "street_tracked.mp4"))
    assert sum(1 for _ in iter(lambda: capture.read()[0], False)) == FRAMES


@pytest.mark.slow
def test_sahi_small_objects_in_large_images(place, plain):
    said = run("SAHI: small objects in large images", place, "sahi")
    sliced, whole = map(int, re.search(r"(\d+) objects in slices, (\d+) in the whole image", said).groups())
    assert whole == plain and sliced > whole
    assert read_image(place / "street_sliced.png").shape == (1080, 1920, 3)


@pytest.mark.slow
def test_pandas_a_folder_into_one_table(place):
    said = run("pandas: a folder into one table", place, "pandas")
    head, *rows = (place / "found.csv").read_text().splitlines()
    assert head == "image,box,xmin,ymin,xmax,ymax,confidence,class,name" and all(row.split(",")[0].endswith(".jpg") for row in rows)
    assert f"person     {sum(row.endswith(',person') for row in rows)}" in re.sub(r" +", "     ", said)


@pytest.mark.slow
def test_threads_many_images_at_once(place):
    lines = [json.loads(line) for line in run("Threads: many images at once", place).splitlines()]
    assert [line["path"] for line in lines] == sorted(p.name for p in place.glob("*.jpg")) and all(line["boxes"] for line in lines)
