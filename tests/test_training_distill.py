"""Distillation: numbers worked by hand, what must hold of any teacher, and whole trainings with one."""
from __future__ import annotations

import copy
import csv
import dataclasses
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from test_training_fit import assert_equal_runs, interrupt_at
from tiny import ANCHORS, NAMES, model_yaml, tiny_model
from torch import Tensor, nn

import train
from models.head import decode
from utils.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.hyp import Hyp
from utils.plots.training import plot_results
from utils.training.distill import Distillation, divergence, output_loss
from utils.training.features import Adapters, channelwise_divergence
from utils.training.loss import DetectionLoss
from utils.training.teacher import Teacher, check_classes, match_anchors, soft_level

CPU = torch.device("cpu")
NO_TARGETS = torch.zeros(0, 6)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def some_images(count: int = 2, side: int = 64) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def sighted(folder: Path, seed: int = 0, **spec: int | list) -> nn.Module:
    """A network, in eval mode, that sees objects in many places."""
    model = tiny_model(folder, seed=seed, **spec).eval()
    for conv in model.head.m:
        conv.weight.data.mul_(8)
        conv.bias.data.view(model.head.num_anchors, -1)[:, 4] = -1.0
    return model


def teacher_of(network: nn.Module, student: nn.Module, scale: float = 1.0) -> Teacher:
    return Teacher(network, "teacher.pt", student, CPU, torch.float32, scale)


def labels_of(model: nn.Module) -> DetectionLoss:
    return DetectionLoss(model.head.anchors, model.head.nc, Hyp(), 64)


# the loss


def test_divergence_by_hand() -> None:
    value = divergence(torch.tensor([math.log(3), 0.0, 2.0]), torch.tensor([0.5, 1.0, 1 / (1 + math.exp(-2))]))
    torch.testing.assert_close(value, torch.tensor([0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), math.log(2), 0.0]))


def one_cell(classes: Sequence[float] = (0.9, 0.2)) -> tuple[Tensor, Tensor]:
    """Raw maps of one cell, student and teacher: the teacher sees an object of its anchor's size with 0.8, in the cell's middle."""
    student, teacher = torch.zeros(1, 1, 1, 1, 5 + len(classes)), torch.zeros(1, 1, 1, 1, 5 + len(classes))
    teacher[..., 4:] = torch.tensor([logit(p) for p in (0.8, *classes)])
    return student, teacher


def test_one_cell_by_hand() -> None:
    """The teacher's anchor has half the student's sides: IoU 1/4, and CIoU too."""
    student, teacher = one_cell()
    labels = DetectionLoss(torch.ones(1, 1, 2), 2, Hyp(), 640)
    soft = soft_level(teacher, torch.tensor([0]), torch.full((1, 2), 0.5), (1, 1))
    box = 0.05 * (1 - 0.25)
    obj = 1.0 * 4.0 * (0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5))  # level weight 4
    cls = 0.5 * 2 / 80 * sum(p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5) for p in (0.9, 0.2)) / 2
    torch.testing.assert_close(output_loss([student], [soft], labels), torch.tensor(3.0 * (box + obj + cls)))  # gains are tuned for three levels


def test_places_count_by_the_teachers_objectness() -> None:
    """Two places, of 0.8 and 0.2: the first has the teacher's very box, the second one of half the sides."""
    student, teacher = torch.zeros(1, 1, 1, 2, 7), torch.zeros(1, 1, 1, 2, 7)
    teacher[0, 0, 0, :, 4] = torch.tensor([logit(0.8), logit(0.2)])
    student[..., 4] = teacher[..., 4]
    student[0, 0, 0, 1, 2:4] = math.log((math.sqrt(0.5) / 2) / (1 - math.sqrt(0.5) / 2))  # (2 s)^2 = 1/2
    soft = soft_level(teacher, torch.tensor([0]), torch.ones(1, 2), (1, 2))
    value = output_loss([student], [soft], DetectionLoss(torch.ones(1, 1, 2), 2, Hyp(), 640))
    torch.testing.assert_close(value, torch.tensor(3 * 0.05 * 0.2 * (1 - 0.25)))


def test_a_single_class_is_left_to_objectness() -> None:
    student, teacher = one_cell((0.9,))
    labels = DetectionLoss(torch.ones(1, 1, 2), 1, Hyp(), 640)
    student[..., 4] = teacher[..., 4]
    assert output_loss([student], [soft_level(teacher, torch.tensor([0]), torch.ones(1, 2), (1, 1))], labels) < 1e-6


def test_background_teaches_objectness_alone() -> None:
    student, teacher = one_cell()
    teacher[..., 4] = logit(0.04)
    student.requires_grad_()
    soft = soft_level(teacher, torch.tensor([0]), torch.full((1, 2), 0.5), (1, 1))
    assert len(soft.image) == 0 and soft.cxcywh.shape == (0, 4) and soft.cls.shape == (0, 2)
    output_loss([student], [soft], DetectionLoss(torch.ones(1, 1, 2), 2, Hyp(), 640)).backward()
    assert student.grad[..., 4].item() == pytest.approx(3 * 4 * (0.5 - 0.04)) and student.grad.count_nonzero() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_finite(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = ((torch.randn(2, 3, 4, 4, 7, generator=generator) * 30).to(dtype) for _ in range(2))  # far into the sigmoids' tails
    student.requires_grad_()
    value = output_loss([student], [soft_level(teacher, torch.arange(3), torch.ones(3, 2), (4, 4))],
                        DetectionLoss(torch.ones(1, 3, 2), 2, Hyp(), 640))
    value.backward()
    assert value.dtype == torch.float32 and value.isfinite() and student.grad.isfinite().all()


def test_no_loss_and_no_gradient_where_they_agree() -> None:
    maps = [torch.randn(2, 3, side, side, 7, generator=torch.Generator().manual_seed(side)).requires_grad_() for side in (4, 2)]
    labels = DetectionLoss(torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(0)) + 0.5, 2, Hyp(), 640)
    levels = [soft_level(raw.detach(), torch.arange(3), anchors, raw.shape[2:4]) for raw, anchors in zip(maps, labels.anchors, strict=True)]
    assert all(len(level.image) > 10 for level in levels), "boxes and classes are compared, too"
    value = output_loss(maps, levels, labels)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-5)
    assert all(raw.grad.abs().max() < 1e-6 for raw in maps)


def left_to_learn(student: nn.Module, teacher: nn.Module) -> float:
    """The output loss of a student in eval mode, thus with the same batch norms."""
    lesson = Distillation(student, [teacher_of(teacher, student)], 1.0, 0.0)(some_images())
    assert all(len(level.image) > 5 for level in lesson.taught[0].levels)
    return output_loss(lesson.maps, lesson.taught[0].levels, labels_of(student)).item()


def test_nothing_to_learn_of_oneself(tmp_path: Path) -> None:
    student = sighted(tmp_path)
    assert left_to_learn(student, student) == pytest.approx(0, abs=2e-5)
    assert left_to_learn(student, sighted(tmp_path, seed=1)) > 0.01


# teachers of other anchors, levels and image sizes


def test_match_anchors() -> None:
    anchors = torch.tensor(ANCHORS[1]).view(3, 2)
    assert match_anchors(anchors, anchors).tolist() == [0, 1, 2]
    for order in ([2, 0, 1], [1, 0, 2]):
        undo = torch.tensor(order).argsort().tolist()
        assert match_anchors(anchors, anchors[order]).tolist() == undo
        assert match_anchors(anchors, anchors[order] * 2.5).tolist() == undo, "fitted at another image size"
    equal = torch.ones(4, 2)
    assert sorted(match_anchors(equal, equal).tolist()) == [0, 1, 2, 3], "each once"


def test_a_teacher_whose_anchors_have_another_order(tmp_path: Path) -> None:
    """The same detector, its anchors written in another order: nothing to learn."""
    student, teacher, order = sighted(tmp_path), sighted(tmp_path), [2, 0, 1]
    teacher.head.anchors.copy_(teacher.head.anchors[:, order])
    with torch.no_grad():
        for conv in teacher.head.m:
            weight, bias = conv.weight.view(3, 7, -1)[order], conv.bias.view(3, 7)[order]
            conv.weight.copy_(weight.reshape(conv.weight.shape))
            conv.bias.copy_(bias.flatten())
    assert left_to_learn(student, teacher) == pytest.approx(0, abs=2e-5)


def places_of(teacher: Teacher, images: Tensor) -> dict[int, Tensor]:
    """By level: (M, 5 + C) of what is taught, in the student's pixels."""
    found = {}
    for level, (soft, stride) in enumerate(zip(teacher(images).levels, teacher.student_strides, strict=True)):
        corner = torch.stack((soft.column, soft.row, *[torch.zeros_like(soft.row)] * 2), 1)
        objectness = soft.objectness[soft.image, soft.anchor, soft.row, soft.column]
        found[level] = torch.cat(((soft.cxcywh + corner) * stride, objectness[:, None], soft.cls), 1)
    return found


def test_boxes_of_other_anchors_are_compared_decoded(tmp_path: Path) -> None:
    """What is taught are the teacher's boxes as it decodes them itself."""
    other = [[7, 9, 21, 20, 15, 33], [33, 21, 18, 33, 40, 44], [60, 61, 70, 44, 52, 70]]
    student, network = sighted(tmp_path), sighted(tmp_path, seed=1, anchors=other)
    places, maps = places_of(teacher_of(network, student), some_images(1)), network(some_images(1))
    for level, taught in places.items():
        decoded = decode([maps[level].detach()], network.head.anchors[[level]], [network.strides[level]])[0]
        seen = decoded[decoded[:, 4] >= 0.05]
        assert len(taught) == len(seen) > 0
        distance = torch.cdist(taught.double(), seen.double())
        assert distance.min(0).values.max() < 1e-3 and distance.min(1).values.max() < 1e-3


@pytest.mark.parametrize("scale", [2.0, 1.5, 0.5])
def test_a_teacher_at_another_image_size(tmp_path: Path, scale: float) -> None:
    """Each box taught is one of the teacher's, in the student's pixels and within the reach of its cell; the surest of a level is among them."""
    student, network, images = sighted(tmp_path), sighted(tmp_path, seed=1), some_images(1, 128)
    teacher = teacher_of(network, student, scale)
    maps = network(teacher._resized(images))
    assert maps[0].shape[2] == 16 * scale
    grids = [level.objectness.shape[2:] for level in teacher(images).levels]
    assert grids == [(16, 16), (8, 8), (4, 4)], "the student's"
    for level, taught in places_of(teacher, images).items():
        decoded = decode([maps[level].detach()], network.head.anchors[[level]], [network.strides[level]])[0]
        decoded[:, :4] /= scale
        distance = torch.cdist(taught.double(), decoded.double())
        assert distance.min(1).values.max() < 1e-3
        surest = decoded[:, 4].argmax()
        assert taught[:, 4].max() == pytest.approx(decoded[surest, 4].item()) and distance[:, surest].min() < 1e-3


def test_cells_of_another_grid_by_hand() -> None:
    raw = torch.zeros(1, 1, 2, 2, 6)
    raw[0, 0, :, :, 4] = torch.tensor([[logit(0.1), logit(0.7)], [logit(0.3), logit(0.2)]])
    raw[0, 0, 0, 1, :2] = torch.tensor([logit(0.75), logit(0.25)])  # offset 1 and 0: at the upper right corner of its cell
    soft = soft_level(raw, torch.tensor([0]), torch.ones(1, 2), (1, 1))
    torch.testing.assert_close(soft.objectness, torch.full((1, 1, 1, 1), 0.7))
    torch.testing.assert_close(soft.cxcywh, torch.tensor([[(1 + 1) / 2, 0.0, 0.5, 0.5]]))

    coarse = torch.zeros(1, 1, 1, 1, 6)
    coarse[..., 4] = logit(0.7)
    coarse[..., :2] = torch.tensor([logit(0.9), 0.0])  # offset 1.3 of its cells, 2.6 of the student's, which reach from -0.5 to 1.5
    soft = soft_level(coarse, torch.tensor([0]), torch.ones(1, 2), (2, 2))
    assert not len(soft.image) and not soft.objectness.any(), "no cell could predict it"
    coarse[..., 0] = logit(0.6)  # 0.7, thus 1.4
    soft = soft_level(coarse, torch.tensor([0]), torch.ones(1, 2), (2, 2))
    torch.testing.assert_close(soft.objectness, torch.full((1, 1, 2, 2), 0.7))
    torch.testing.assert_close(soft.cxcywh, torch.tensor([[1.4, 1, 2, 2], [0.4, 1, 2, 2], [1.4, 0, 2, 2], [0.4, 0, 2, 2]]))


def test_a_teacher_of_more_levels(tmp_path: Path) -> None:
    student, network = sighted(tmp_path), sighted(tmp_path, seed=1, levels=4)
    teacher = teacher_of(network, student)
    assert network.strides == (4, 8, 16, 32) and teacher.own_levels == [1, 2, 3]
    taught, maps = teacher(some_images()), network(some_images())
    for level, order, raw in zip(taught.levels, teacher.orders, maps[1:], strict=True):
        torch.testing.assert_close(level.objectness, raw[:, order][..., 4].sigmoid())
    assert [f.shape[2:] for f in taught.features] == [(8, 8), (4, 4), (2, 2)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [({"levels": 2}, r"--teacher teacher.pt: predicts at strides 8, 16, the network also at 32: teacher and student need the same levels"),
     ({"anchors": 2}, r"--teacher teacher.pt: has 2 anchors a level, the network 3")],
)  # fmt: skip
def test_teachers_that_do_not_fit(tmp_path: Path, spec: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        teacher_of(tiny_model(tmp_path, **spec), tiny_model(tmp_path))


def test_classes() -> None:
    check_classes(("Red", "green "), ("red", "Green"), "t.pt", "take another")
    many = [f"c{n}" for n in range(80)]
    for names, wanted, parts in (
        (("red",), NAMES, ("t.pt", "the 1 classes red,", "the 2 classes red, green")),
        (("green", "red"), NAMES, ("class 0 is green there, red here",)),
        (many, NAMES, ("the 80 classes c0, c1, c2, c3, c4 …,", "the 2 classes red, green")),
        ([*many[:-1], "other"], many, ("class 79 is other there, c79 here",)),
    ):
        with pytest.raises(UserError) as error:
            check_classes(names, wanted, "t.pt", "take another")
        assert all(part in str(error.value) for part in (*parts, ": take another; ")), error.value


# features


def test_channelwise_divergence_by_hand() -> None:
    """Two places: the student's channel is even, the teacher's 3 : 1 after the temperature of 4."""
    teacher = 4 * torch.tensor([math.log(3), 0.0]).view(1, 1, 1, 2)
    expected = 16 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    torch.testing.assert_close(channelwise_divergence(torch.zeros(1, 1, 1, 2), teacher), torch.tensor(expected))
    agreeing = torch.cat((teacher, teacher + 5), 1)  # a channel's offset is not taught
    torch.testing.assert_close(channelwise_divergence(torch.cat((torch.zeros(1, 1, 1, 2), teacher), 1), agreeing), torch.tensor(expected / 2))
    assert channelwise_divergence(teacher, teacher) == 0


def test_channelwise_divergence_equals_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64).float() for _ in range(2))
    own, wanted = ((x.double().flatten(2) / 4).exp() for x in (student, teacher))
    own, wanted = own / own.sum(2, keepdim=True), wanted / wanted.sum(2, keepdim=True)
    expected = 16 * (wanted * (wanted / own).log()).sum(2).mean()
    torch.testing.assert_close(channelwise_divergence(student, teacher), expected.float())
    finer = teacher.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(channelwise_divergence(student, finer), expected.float(), msg="a teacher at twice the image size")


def test_adapters_where_widths_differ() -> None:
    adapters = Adapters([8, 16], [8, 4])
    assert isinstance(adapters[0], nn.Identity) and [p.shape for p in adapters.parameters()] == [(4, 16, 1, 1)]
    a, b = adapters([torch.ones(1, 8, 2, 2), torch.ones(1, 16, 2, 2)])
    assert torch.equal(a, torch.ones(1, 8, 2, 2)) and b.shape == (1, 4, 2, 2)


# student and teachers together


def test_gradients_reach_the_student_and_the_adapters_alone(tmp_path: Path) -> None:
    student, network = sighted(tmp_path).train(), sighted(tmp_path, seed=1, width=16)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    distillation = Distillation(student, [teacher_of(network, student)], 1.0, 1.0)
    criterion = distillation.criterion(labels_of(student))
    assert criterion.names == ("box", "obj", "cls", "distill", "features")
    loss = criterion(distillation(some_images()), NO_TARGETS)
    loss.total.backward()
    assert loss.parts.shape == (5,) and loss.total.item() == pytest.approx(2 * loss.parts.sum().item()), "counted once an image"
    learners = dict(distillation.named_parameters())
    assert {key.split(".")[0] for key in learners} == {"student", "adapters"}
    assert all(p.grad is not None and p.grad.any() for key, p in learners.items())
    assert not any(p.requires_grad for p in distillation.teachers[0].network.parameters())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not student.head._forward_pre_hooks, "what listened to the head is gone"


def test_an_ensemble_is_the_mean_of_its_teachers(tmp_path: Path) -> None:
    student, a, b = sighted(tmp_path), sighted(tmp_path, seed=1), sighted(tmp_path, seed=2, width=16)
    teachers = [teacher_of(network, student) for network in (a, b)]

    def taught_by(*chosen: Teacher) -> Tensor:
        torch.manual_seed(0)
        distillation = Distillation(student, chosen, 0.5, 2.0)
        return distillation.criterion(labels_of(student))(distillation(some_images()), NO_TARGETS).parts

    one, other, both = taught_by(teachers[0]), taught_by(teachers[1]), taught_by(*teachers)
    torch.testing.assert_close(both[:4], (one[:4] + other[:4]) / 2)
    assert both[4] > 0 and len(Distillation(student, teachers, 1.0, 1.0).adapters) == 2


def test_gains(tmp_path: Path) -> None:
    student, network = sighted(tmp_path), sighted(tmp_path, seed=1)
    parts = {}
    for gains in ((1.0, 1.0), (0.5, 3.0), (1.0, 0.0), (0.0, 1.0)):
        distillation = Distillation(student, [teacher_of(network, student)], *gains)
        criterion = distillation.criterion(labels_of(student))
        parts[gains] = dict(zip(criterion.names, criterion(distillation(some_images()), NO_TARGETS).parts.tolist(), strict=True))
    full = parts[1.0, 1.0]
    assert parts[0.5, 3.0] == pytest.approx(full | {"distill": full["distill"] / 2, "features": full["features"] * 3})
    assert set(full) - set(parts[1.0, 0.0]) == {"features"} and set(full) - set(parts[0.0, 1.0]) == {"distill"}


def test_learns_of_a_teacher_alone(tmp_path: Path) -> None:
    """On images without a label the student becomes what the teacher is."""
    student, network = sighted(tmp_path), sighted(tmp_path, seed=1)
    distillation = Distillation(student, [teacher_of(network, student)], 1.0, 0.0)
    optimizer, labels, losses = torch.optim.Adam(student.parameters(), 0.01), labels_of(student), []
    for _ in range(60):
        lesson = distillation(some_images())
        loss = output_loss(lesson.maps, lesson.taught[0].levels, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


# whole trainings


def save(network: nn.Module, path: Path) -> str:
    save_checkpoint(path, Checkpoint(network.spec.to_dict(), network.names, dict(network.state_dict())))
    return str(path)


@pytest.fixture(scope="module")
def teacher(place: Path) -> str:
    """A checkpoint, wider than the student."""
    (place / "teacher").mkdir()
    return save(sighted(place / "teacher", seed=1, width=16), place / "teacher.pt")


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def error_of(argv: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ends with; its exit code must be 2."""
    capfd.readouterr()
    assert train.main(argv) == 2
    err = [line for line in capfd.readouterr().err.splitlines() if line.startswith(("error:", "Traceback"))]
    assert len(err) == 1, err
    return err[0]


def test_train_with_a_teacher(
    flags: list[str], place: Path, teacher: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    assert train.main([*flags, "--name", "plain"]) == 0
    capfd.readouterr()
    resized, seen = Teacher._resized, []
    monkeypatch.setattr(Teacher, "_resized", lambda self, images: seen.append(resized(self, images)) or seen[-1])
    assert train.main([*flags, "--name", "taught", "--teacher", "teacher.pt", "--distill-features", "0.5", "--teacher-imgsz", "96"]) == 0
    assert {tuple(images.shape[2:]) for images in seen} == {(96, 96)}
    shown = capfd.readouterr()
    assert f"teacher: {teacher} (0.01 M parameters) at 96 px" in shown.out and "distill" in shown.err and "features" in shown.err
    plain, taught = rows(place / "runs" / "plain"), rows(place / "runs" / "taught")
    assert set(taught[0]) - set(plain[0]) == {"train/distill_loss", "train/features_loss"}
    assert all(float(row["train/distill_loss"]) > 0 and float(row["train/features_loss"]) > 0 for row in taught)
    assert taught[0]["train/box_loss"] != plain[0]["train/box_loss"] and set(plain[0]) <= set(taught[0])
    for name in ("best.pt", "last.pt"):
        a, b = (load_checkpoint(place / "runs" / run / "weights" / name) for run in ("plain", "taught"))
        assert {key: value.shape for key, value in a.state_dict.items()} == {key: value.shape for key, value in b.state_dict.items()}
        assert a.spec == b.spec and (b.training is None) == (name == "best.pt")
    assert b.training["config"]["teacher"] == (teacher,), "found again from any folder"
    assert set(b.training["model"]) == set(a.training["model"]) and b.training["adapters"].keys() == {f"0.{n}.weight" for n in range(3)}
    plot_results(place / "runs" / "taught" / "results.csv", place / "results.png")


def test_a_teacher_of_yolov5(place: Path, shared: Path, tmp_path: Path) -> None:
    """Its own .pt file, with its 80 classes."""
    names = load_checkpoint(shared / "weights" / "yolov5n.pt").names
    data = yaml.safe_load((place / "tiny_data.yaml").read_text()) | {"names": list(names), "path": str(place)}
    (tmp_path / "coco.yaml").write_text(yaml.safe_dump(data))
    assert train.main(["--cfg", str(model_yaml(tmp_path)), "--teacher", str(shared / "weights" / "yolov5n.pt"), "--data", str(tmp_path / "coco.yaml"),
                       "--imgsz", "64", "--epochs", "1", "--batch-size", "4", "--workers", "0", "--device", "cpu", "--noplots", "--noautoanchor",
                       "--project", str(tmp_path / "runs")]) == 0
    assert float(rows(tmp_path / "runs" / "exp")[0]["train/distill_loss"]) > 0


def test_a_teacher_in_bf16(tmp_path: Path) -> None:
    student, network = sighted(tmp_path), sighted(tmp_path, seed=1)
    exact, low = (Teacher(copy.deepcopy(network), "t.pt", student, torch.device("cpu"), dtype)(some_images()) for dtype in (
        torch.float32, torch.bfloat16))
    for a, b in zip(exact.levels, low.levels, strict=True):
        assert b.objectness.dtype == torch.float32 and not torch.equal(a.objectness, b.objectness)
        torch.testing.assert_close(a.objectness, b.objectness, atol=0.05, rtol=0)


def test_resumed_equals_uninterrupted(flags: list[str], place: Path, teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With adapters, which have a memory of their own, and two teachers of other widths."""
    (place / "other").mkdir()
    other = save(sighted(place / "other", seed=2, width=24), place / "other.pt")
    argv = [*flags, "--teacher", teacher, other, "--distill-features", "1", "--multi-scale", "--epochs", "3"]
    assert train.main([*argv, "--name", "whole"]) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, batch=4)
        assert train.main([*argv, "--name", "cut"]) == 2
    run = place / "runs" / "cut"
    assert load_checkpoint(run / "weights" / "last.pt").training["epoch"] == 1
    monkeypatch.chdir(place / "other")
    assert train.main(["--resume", str(run / "weights" / "last.pt")]) == 0
    assert_equal_runs(run, place / "runs" / "whole")


def test_resume_without_its_teacher(flags: list[str], place: Path, teacher: str, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copy(teacher, place / "lost.pt")
    assert train.main([*flags, "--teacher", str(place / "lost.pt"), "--epochs", "1", "--name", "orphan"]) == 0
    (place / "lost.pt").unlink()
    message = error_of(["--resume", str(place / "runs" / "orphan" / "weights" / "last.pt"), "--epochs", "2"], capfd)
    assert f"{place / 'lost.pt'}: no such weights file" in message


def test_mistakes_are_one_line(flags: list[str], place: Path, teacher: str, capfd: pytest.CaptureFixture[str]) -> None:
    (place / "foreign").mkdir()
    foreign = save(tiny_model(place / "foreign", names=("cat", "dog", "cow")), place / "foreign.pt")
    (place / "text.pt").write_text("no checkpoint")
    cases = [
        (["--distill", "0.5"], "--distill: needs a teacher"),
        (["--distill-features", "1"], "--distill-features: needs a teacher"),
        (["--teacher-imgsz", "96"], "--teacher-imgsz: needs a teacher"),
        (["--teacher", teacher, "--distill", "0"], "--distill 0: leaves nothing to learn"),
        (["--teacher", teacher, "--distill", "-1"], "--distill -1.0: must be 0 or more"),
        (["--teacher", teacher, "--teacher-imgsz", "8"], "--teacher-imgsz 8: must be between"),
        (["--teacher", "nowhere.pt"], "nowhere.pt: no such weights file (weights are not downloaded)"),
        (["--teacher", str(place / "text.pt")], "text.pt"), (["--teacher", str(place)], f"{place}: is a folder; name the weights file in it"),
        (["--soft-ratio", "0.7"], "--soft-ratio: is the share of --soft-prune"),
        (["--teacher", teacher, foreign], "foreign.pt: knows the 3 classes cat, dog, cow, the data has the 2 classes red, green"),
    ]  # fmt: skip
    for extra, message in cases:
        assert message in error_of([*flags, *extra, "--name", "mistake"], capfd), extra
    assert not list((place / "runs").glob("mistake*"))


def test_a_part_that_is_not_finite_is_named(flags: list[str], place: Path, teacher: str, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint = load_checkpoint(teacher)
    broken = {key: value * math.nan if key.endswith("m.0.bias") else value for key, value in checkpoint.state_dict.items()}
    save_checkpoint(place / "broken.pt", dataclasses.replace(checkpoint, state_dict=broken))
    assert "distill nan" in error_of([*flags, "--teacher", str(place / "broken.pt"), "--name", "nan"], capfd)
