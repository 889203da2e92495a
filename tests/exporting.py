"""A network on its way into a file of another runtime."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import lively
from transplant import sow

import export
from models.spec import load_spec
from models.yolo import DetectionModel
from utils.checkpoint import Checkpoint, save_checkpoint
from utils.errors import UserError
from utils.export.backends import open_network
from utils.export.formats import FORMATS, ExportJob
from utils.export.metadata import ExportMetadata


def job_of(network: DetectionModel, imgsz: tuple[int, int] = (64, 96), precision: str = "fp32", dynamic: bool = False) -> ExportJob:
    return ExportJob(network, ExportMetadata.of(network, imgsz, dynamic=dynamic, precision=precision, source="tiny.pt"), batch_size=2)


def assert_exports(cfg: str, folder: Path, kind: str, rtol: float = 1e-3) -> None:
    """export.py's own proof holds, and so does a comparison with the same network, lively."""
    sow(cfg)
    model = DetectionModel(load_spec(cfg, nc=3))
    own = lively(model)
    for conv, better in zip(model.head.m, own.head.m, strict=True):
        conv.load_state_dict(better.state_dict())
    side = max(64, model.max_stride)
    save_checkpoint(folder / "own.pt", Checkpoint(model.spec.to_dict(), model.names, dict(model.state_dict())))
    assert export.main(["--weights", str(folder / "own.pt"), "--include", kind, "--imgsz", str(side)]) == 0
    images = torch.rand(1, 3, side, side)
    torch.testing.assert_close(open_network(folder / f"own{FORMATS[kind].suffix}")(images), own.decode(own(images)), rtol=rtol, atol=5e-3)


def assert_cut_off_is_told(file: Path, share: float, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A share of the file alone gives one line, and nothing of the runtime's own."""
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=words) as caught:
        open_network(file)
    assert "\n" not in str(caught.value) and "".join(capfd.readouterr()) == ""
