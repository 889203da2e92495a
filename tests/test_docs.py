"""What README, docs and the heads of files tell users to type and to open is there."""
from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny import picture_split

import export
from models.detector import Detector
from utils.compress.pruning import check_settings
from utils.config import CompareConfig, DetectConfig, ExportConfig, PruneConfig, QuantizeConfig, TrainConfig, ValConfig
from utils.files import ROOT
from utils.flags import parse_given

CONFIGS = {"train": TrainConfig, "val": ValConfig, "detect": DetectConfig, "compare": CompareConfig, "export": ExportConfig, "prune": PruneConfig,
           "quantize": QuantizeConfig}  # fmt: skip
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(rf"^(?:[A-Z_]+=\S* )*(?:python3?|torchrun --nproc_per_node \d+) ({'|'.join(CONFIGS)})\.py(.*)$")


def commands(path: Path) -> Iterator[tuple[str, str]]:
    """Script and flags of each whole command line: of code in a page, of indented or commented lines elsewhere."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        lines = [line for block in blocks for line in re.sub(r"\\\n", " ", block).splitlines()] + [" ".join(span.split()) for span in spans]
    else:
        lines = [line.strip().removeprefix("# ").strip() for line in text.splitlines()]
    for line in lines:
        for part in line.split(" && "):
            if (found := COMMAND.match(part.strip())) and "…" not in part:
                yield found[1], found[2].replace("$P", "--plugin my_blocks.py").strip()


@pytest.mark.parametrize("path", [*PAGES, *(ROOT / f"{name}.py" for name in CONFIGS)], ids=lambda path: path.name)
def test_commands_are_understood(path: Path) -> None:
    for script, flags in commands(path):
        given = parse_given(CONFIGS[script], shlex.split(flags, comments=True), "")
        assert given, flags
        if script == "prune":
            check_settings(PruneConfig(**given))


def test_there_are_commands_to_understand() -> None:
    found = [command for path in PAGES for command in commands(path)]
    assert len(found) > 50 and {script for script, _ in found} == set(CONFIGS)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", path.read_text(encoding="utf-8")):
        assert re.match(r"https?://", target) or (path.parent / target).exists(), target


QUICKLY = {
    "train": ["--epochs", "1", "--imgsz", "64", "--batch-size", "8", "--workers", "0", "--noplots"], "val": ["--workers", "0"], "detect": [],
    "compare": ["--epochs", "1", "--imgsz", "64", "--batches", "1", "--workers", "0"], "prune": ["--candidates", "2", "--workers", "0"],
    "quantize": ["--calib", "8"], "export": [],
}  # fmt: skip


@pytest.mark.slow
def test_the_readme_from_top_to_bottom(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command on a set of one's own, in the order of the page and in one folder, finds what those before it wrote."""
    for package in ("onnxruntime", "openvino", "nncf"):
        pytest.importorskip(package)
    split_folders = [tmp_path / "my_set" / "images" / name for name in ("train", "val")]
    for folder in split_folders:
        labels = tmp_path / "my_set" / "labels" / folder.name
        folder.mkdir(parents=True), labels.mkdir(parents=True)
        split = picture_split(folder, [(64, 64)] * 16)
        for image, rows in zip(split.images, split.boxes, strict=True):
            np.savetxt(labels / f"{Path(image).stem}.txt", rows, "%d %.4f %.4f %.4f %.4f")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (spec,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "my_set.yaml").write_text(spec)
    shutil.copy(shared / "weights" / "yolov5n.pt", tmp_path)
    monkeypatch.chdir(tmp_path)
    ran = []
    for line in "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines():
        found = COMMAND.match(line.strip())
        if not found or "my_set" not in line or line.startswith("torchrun"):
            continue
        flags = shlex.split(found[2], comments=True)
        quickly = ["--workers", "0"] if "--formats" in flags else QUICKLY[found[1]]
        seeds = ["--seeds", "0"] if "--seeds" in flags else []
        assert importlib.import_module(found[1]).main([*flags, *quickly, *seeds]) == 0, line
        ran.append(found[1])
    assert set(ran) == set(CONFIGS)


@pytest.mark.parametrize("image", ["bus.jpg", "zidane.jpg"])
def test_the_program_without_this_project_finds_the_same(image: str, shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8"), re.DOTALL)
    shutil.copy(shared / "weights" / "yolov5n.pt", tmp_path / "best.pt")
    shutil.copy(shared / "media" / image, tmp_path / "bus.jpg")
    assert export.main(["--weights", str(tmp_path / "best.pt"), "--include", "onnx", "--imgsz", "384", "640"]) == 0
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [list(map(float, re.findall(r"-?\d+\.?\d*", line))) for line in done.stdout.splitlines()]
    (found,) = Detector(tmp_path / "best.onnx")(tmp_path / "bus.jpg")
    assert len(found) >= 3
    np.testing.assert_allclose(rows, np.column_stack((found.cls, found.conf, found.xyxy)), atol=0.1)
