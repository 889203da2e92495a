"""Costs row by row: counts against the whole network's, times on a clock that only the rows advance."""
from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tiny import tiny_model

from models.rowcost import RowCost, RowCosts, cost_table, row_costs, row_gflops
from models.spec import load_spec
from models.summary import count_gflops, count_parameters
from models.yolo import DetectionModel
from utils.measure.timing import Latency
from utils.plots.cost import draw_row_costs

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["yolov5n.yaml", "yolov5s-shuffle.yaml", "yolov5s-transformer.yaml", "yolov5-bifpn.yaml"])
def test_the_rows_gflops_are_the_networks(name: str):
    model = DetectionModel(load_spec(name))
    rows = row_gflops(model, 64)
    assert len(rows) == len(model.model) and min(rows) >= 0
    assert sum(rows) == pytest.approx(count_gflops(model, 64), rel=1e-9)


def test_gflops_by_hand(tmp_path: Path):
    """Detect at 64 px: 8 x 8, 4 x 4 and 2 x 2 cells, 3 x (5 + 2) outputs of 8 channels and a bias each. SiLU and its like count nothing."""
    model = tiny_model(tmp_path)
    assert row_gflops(model, 64)[-1] == pytest.approx(2 * (64 + 16 + 4) * 21 * (8 + 1) / 1e9)
    assert row_gflops(model, 128)[-1] == pytest.approx(4 * row_gflops(model, 64)[-1])


def test_times_are_each_rows_own(tmp_path: Path):
    """Row i takes i + 1, 2 (i + 1) … 5 (i + 1) ms in the five rounds, but 1 s in each of the warm-up's two runs."""
    model, now, calls = tiny_model(tmp_path), 0.0, [0] * 6

    def advance(i: int):
        def hook(*_: object) -> None:
            nonlocal now
            n = calls[i] = calls[i] + 1
            now += 1.0 if n <= 2 else (n - 2) * (i + 1) / 1000

        return hook

    for i, module in enumerate(model.model):
        module.register_forward_hook(advance(i))
    network = model.fused()  # the hooks go with the copies, and run while they are made
    calls[:] = [0] * 6
    model.fused = lambda: network  # type: ignore[method-assign]
    costs = row_costs(model, 64, CPU, torch.float32, rounds=5, clock=lambda: now)
    assert [cost.row for cost in costs.rows] == [0, 1, 2, 3, 4, 5]
    assert [cost.module for cost in costs.rows] == ["Conv"] * 5 + ["Detect"]
    assert [cost.ms for cost in costs.rows] == pytest.approx([3, 6, 9, 12, 15, 18])
    assert [cost.ms_share for cost in costs.rows] == pytest.approx([n / 21 for n in range(1, 7)])
    assert costs.whole[:2] == pytest.approx((63, 21 * 4.6)) and costs.whole.runs == 5
    assert costs.remark == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_costs_of_a_real_network(tmp_path: Path, dtype: torch.dtype):
    model = tiny_model(tmp_path)
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    costs = row_costs(model, 64, CPU, dtype, rounds=3)
    assert sum(cost.parameters for cost in costs.rows) == count_parameters(model)
    assert sum(cost.gflops for cost in costs.rows) == pytest.approx(count_gflops(model, 64), rel=1e-9)
    assert sum(cost.gflops_share for cost in costs.rows) == pytest.approx(1) == sum(cost.ms_share for cost in costs.rows)
    assert all(cost.ms > 0 for cost in costs.rows) and costs.whole.runs == 3
    assert model.training and sum(len(m._forward_hooks) for m in model.modules()) == hooks  # the caller's model is as it was


COSTS = RowCosts(
    [RowCost(0, "Conv", 3520, 0.75, 2.0, 0.75, 0.25), RowCost(1, "nn.Upsample", 0, 0.0, 0.0, 0.0, 0.0),
     RowCost(2, "Detect", 1000, 0.25, 6.0, 0.25, 0.75)],
    Latency(8.5, 9, 0.1, 20), "noisy: the machine was busy",
)  # fmt: skip


def test_table():
    head, *rows, total, remark = cost_table(COSTS).splitlines()
    assert head.split() == ["row", "module", "params", "GFLOPs", "%", "GFLOPs", "ms", "%", "time"]
    assert [line.split() for line in rows] == [["0", "Conv", "3,520", "0.750", "75.0", "2.000", "25.0"],
                                               ["1", "nn.Upsample", "0", "0.000", "0.0", "0.000", "0.0"],
                                               ["2", "Detect", "1,000", "0.250", "25.0", "6.000", "75.0"]]
    assert total.split() == ["all", "4,520", "1.000", "8.000"]
    assert remark == "noisy: the machine was busy"
    assert len({len(line) for line in (head, *rows)}) == 1
    assert "noisy" not in cost_table(COSTS._replace(remark=""))


def pixels(image: np.ndarray, blue: int, green: int, red: int) -> int:
    return int((np.abs(image.astype(int) - (blue, green, red)).max(2) < 8).sum())


@pytest.mark.parametrize(("gflops", "time"), [(0.9, 0.3), (0.3, 0.9)])
def test_picture(tmp_path: Path, gflops: float, time: float):
    """The coloured areas are as the shares."""
    rows = [(f"{i} a_$name", share_1, share_2) for i, (share_1, share_2) in enumerate([(gflops, time), (0.0, 0.0), (1 - gflops, 1 - time)])]
    draw_row_costs(tmp_path / "cost.png", rows[:2], "a $title_")
    image = cv2.imread(str(tmp_path / "cost.png"))
    sky_blue, vermilion = pixels(image, 0xE9, 0xB4, 0x56), pixels(image, 0x00, 0x5E, 0xD5)
    assert sky_blue / vermilion == pytest.approx(gflops / time, rel=0.15)
    draw_row_costs(tmp_path / "tall.png", rows * 20, "many")
    assert cv2.imread(str(tmp_path / "tall.png")).shape[0] > 2 * image.shape[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cost.png", "tall.png"]
