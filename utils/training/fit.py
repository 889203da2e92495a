"""A whole training: epochs, validation, checkpoints, early stop, and going on after an interruption."""
from __future__ import annotations

import copy
import csv
import dataclasses
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from utils.checkpoint import Checkpoint, cast_floats, for_inference, load_checkpoint, save_checkpoint
from utils.compress.rounding import rounded
from utils.config import for_next, quoted
from utils.data.dataset import RectDataset, TrainDataset, rect_order, rect_targets, scaled_sizes
from utils.data.imagecache import ImageCache, memory_limit
from utils.data.labels import Split
from utils.data.loader import EpochBatches, make_loader, worker_count
from utils.data.open import val_loader
from utils.device import compute_dtype, peak_memory_bytes
from utils.distributed import World
from utils.errors import UserError
from utils.evaluate.table import score_table
from utils.evaluate.validate import ValResult, validate
from utils.files import atomic_write, remove_leftovers
from utils.log import info
from utils.plots.run import draw_data, draw_validation
from utils.plots.training import plot_gammas, plot_results
from utils.training.distill import Distillation
from utils.training.ema import ModelEma
from utils.training.engine import EpochResult, random_resize, same_size, train_epoch
from utils.training.loss import DetectionLoss
from utils.training.optim import build_optimizer, load_optimizer
from utils.training.qat import QuantizationAware
from utils.training.runs import Run
from utils.training.schedule import progress, settings, warmup_steps
from utils.training.sparsity import GAMMA_BINS, Sparsity
from utils.training.state import TrainState
from utils.training.stepper import Stepper
from utils.training.tensorboard import Scalars

_ALONE, _DENSE = World(), Sparsity()
_COLUMNS = {"mAP50": "mAP_0.5", "mAP50-95": "mAP_0.5:0.95"}  # as YOLOv5's results.csv calls them


class Training:
    """Trains `model` on two splits; `run()` goes from the state's epoch to the last."""

    def __init__(
        self, model: torch.nn.Module, run: Run, train_split: Split, val_split: Split, device: torch.device, world: World = _ALONE,
        distillation: Distillation | None = None, sparsity: Sparsity = _DENSE, host_bytes: int = 0,
    ) -> None:
        """
        Args:
            model: a DetectionModel on `device`; see models/yolo.py.
            run: in its folder, with a whole batch size (over all processes) and an image size that the strides divide.
            distillation: `model` beside its teachers, if it has any.
            sparsity: of `model`.
            host_bytes: of this machine's memory that a step takes in this process, which the caches leave free.
        """
        config, hyp = run.config, run.hyp
        self.model, self.config, self.hyp, self.run_dir, self.device, self.world = model, config, hyp, run.folder, device, world
        self.train_split, self.val_split = train_split, val_split
        self.dtype = compute_dtype(config.precision, device)
        self.state = run.state or TrainState({}, dataclasses.asdict(hyp))
        self.state.config = dataclasses.asdict(config)
        self._load_data(host_bytes)
        self.criterion = DetectionLoss(model.head.anchors, model.head.nc, hyp, config.imgsz, config.label_smoothing, model.strides)
        self.distillation = distillation
        self.objective = distillation.criterion(self.criterion) if distillation else self.criterion  # of training; validation asks no teacher
        self.quantization = QuantizationAware.of(model, train_split, config) if config.qat else None
        if distillation and self.quantization:
            distillation.student = self.quantization
        learner = distillation or self.quantization or model  # what has weights to move
        # Resumed, `model` arrives with the averaged weights: the average is copied from it here, before `_restore` brings the raw ones back.
        optimizer = build_optimizer(learner, config.optimizer, hyp, config.batch_size, fused=self.dtype != torch.float16)
        self.sparsity = sparsity
        self.stepper = Stepper(model, optimizer, ModelEma(model), device, self.dtype, sparsity.slimming)
        self.network = world.wrap(learner, device, config.sync_bn)
        self.scalars = Scalars(run.folder) if world.rank == 0 else None
        self.result: ValResult | None = None
        if run.state:
            self._restore(run.state)
        self._calibrate()

    def run(self) -> None:
        """Train to the last epoch, the time limit or the end of patience; last.pt is whole after each epoch."""
        while self.state.epoch < self.config.epochs:
            epoch = self.state.epoch
            epoch_start = time.perf_counter()
            trained = self.train_one_epoch(epoch, _eta(self.state, self.config.epochs, self.config.time_limit * 60))
            self._check_weights(epoch)
            if self.sparsity.soft_pruning:
                self.sparsity.soft_pruning(self.model, self.stepper.ema.model)
            self._calibrate()
            stop = False
            if self.world.rank == 0:
                self._validate(epoch)
                self._record(epoch, trained, time.perf_counter() - epoch_start)
                self.state.epoch, self.state.step = epoch + 1, self.state.step + trained.steps
                self.state.seconds += time.perf_counter() - epoch_start
                self._keep_best(epoch)
                stop = self._is_over(epoch)
                self.state.finished = stop or self.state.epoch >= self.config.epochs
                self._save()
            stop, self.state.epoch, self.state.step, self.state.seconds, self.state.class_ap = self.world.share(
                (stop, self.state.epoch, self.state.step, self.state.seconds, self.state.class_ap))
            if stop:
                break

    def draw_data(self) -> None:
        """Pictures of what the network will see."""
        draw_data(self.run_dir, self.train_split, self.train_loader.dataset, self.config.batch_size)

    def report(self) -> None:
        """Score best.pt as it lies on disk, draw its pictures and say what to do next. In the first process only."""
        best = self.run_dir / "weights" / "best.pt"
        model = copy.deepcopy(self.stepper.ema.model)
        model.load_state_dict(cast_floats(load_checkpoint(best).state_dict, torch.float32))
        if self.quantization:
            self.quantization.ranges = self.quantization.measure(model)
        result = validate(self._for_inference(model), self.val_loader, self.val_split, self.device, self.dtype)
        if not self.config.noplots:
            plot_results(self.run_dir / "results.csv", self.run_dir / "results.png")
            if self.sparsity.slimming:
                plot_gammas(np.array(self.state.gammas), GAMMA_BINS, self.run_dir / "gammas.png")
            draw_validation(self.run_dir, result, self.val_split)
        info(f"\n{score_table(result, self.val_split, per_class=True)}\n")
        info(f"weights:  {best} ({best.stat().st_size / 1e6:.1f} MB), and last.pt beside it to --resume from")
        if not self.config.noplots:
            info(f"pictures: {self.run_dir / 'results.png'}, PR_curve.png, confusion_matrix.png, val_batch0.jpg and more beside them")
        if self.quantization:
            info("scores:   as int8 computes; the file itself is made, and scored, by")
            info(f"next:     python quantize.py --weights {quoted(best)} --data {quoted(self.config.data)} --to openvino"
                 f"{for_next(self.config)}    (or --to onnx)")
        else:
            plugin = f" --plugin {quoted(self.config.plugin)}" if self.config.plugin else ""
            info(f"next:     python detect.py --weights {quoted(best)} --source {quoted(Path(self.val_split.images[0]).parent)}{plugin}")

    def _load_data(self, host_bytes: int) -> None:
        config, stride = self.config, self.model.pad_stride
        workers, pin = worker_count(config.workers), self.device.type == "cuda"
        limit = memory_limit(config.cache, self.world.size, host_bytes)
        sizes = scaled_sizes(self.train_split, config.imgsz)
        cache = ImageCache(sizes, config.cache, limit, self.run_dir)
        if config.rect:
            targets = rect_targets(self.train_split, config.imgsz, stride, config.batch_size, pad=0.0)
            train_set = RectDataset(self.train_split, config.imgsz, cache, targets, self.hyp, config.seed)
        else:
            train_set = TrainDataset(self.train_split, config.imgsz, self.hyp, cache, config.seed)
        order = rect_order(self.train_split) if config.rect else np.arange(len(train_set))
        self.batches = EpochBatches(order, config.batch_size, seed=config.seed, shuffle="batches" if config.rect else "images",
                                    rank=self.world.rank, world=self.world.size)
        self.train_loader = make_loader(train_set, self.batches, workers, pin)
        if self.world.rank == 0:
            self.val_loader = val_loader(self.val_split, config.imgsz, config.batch_size // self.world.size, stride, config.workers, self.device,
                                         config.cache, max(limit - cache.bytes, 0), self.run_dir)

    def train_one_epoch(self, epoch: int, eta: str = "") -> EpochResult:
        """One pass over the training split; the caller counts epochs, validates and saves."""
        config = self.config
        torch.manual_seed(config.seed + epoch)  # dropout's stream depends on the epoch alone: a resumed run draws the same
        self.batches.epoch = epoch
        self.batches.weights = self._image_weights()
        warmup = warmup_steps(self.hyp, len(self.batches))
        done = progress(epoch, config.epochs, self.state.seconds, config.time_limit * 60)
        resize = random_resize(config.imgsz, self.model.max_stride, config.seed, epoch) if config.multi_scale else same_size
        self.model.train()
        return train_epoch(
            self.network, self.train_loader, self.objective, self.stepper,
            settings=lambda n: settings(self.state.step + n, done, warmup, config.batch_size, self.hyp, config.cos_lr),
            resize=resize, title=f"epoch {epoch + 1}/{config.epochs} {eta}".rstrip(), world=self.world.size,
        )

    def _check_weights(self, epoch: int) -> None:
        """The loss tells of all steps but an epoch's last."""
        average = self.stepper.ema.model.state_dict()
        if broken := [key for key, tensor in average.items() if tensor.is_floating_point() and not tensor.isfinite().all()]:
            raise UserError(f"after epoch {epoch + 1} {len(broken)} tensors are not finite, {broken[0]} the first: lower lr0 in --hyp, or try "
                            "--precision fp32; last.pt holds the epoch before, if there was one")

    def _image_weights(self) -> np.ndarray | None:
        """--image-weights: images of classes that score low, and of rare ones, are drawn more often."""
        return image_chances(self.train_split, self.state.class_ap) if self.config.image_weights else None

    def _calibrate(self) -> None:
        """--qat: ranges as the averaged network has them now, for its validation and for the next epoch."""
        if self.quantization:
            self.quantization.calibrate(self.stepper.ema.model, self.world)

    def _for_inference(self, model: torch.nn.Module) -> torch.nn.Module:
        return rounded(model, self.quantization.ranges) if self.quantization else model.fused()

    def _validate(self, epoch: int) -> None:
        last = epoch + 1 == self.config.epochs
        if self.config.noval and not last:
            self.result = None
            return
        network = self._for_inference(self.stepper.ema.model)
        self.result = validate(network, self.val_loader, self.val_split, self.device, self.dtype, criterion=self.criterion)
        scores = self.result.scores
        self.state.class_ap = np.nan_to_num(scores.per_class_ap, nan=np.nan_to_num(scores.ap)).tolist()  # what val lacks is as needy as the mean

    def _record(self, epoch: int, trained: EpochResult, seconds: float) -> None:
        row = {"epoch": epoch, "time_s": round(seconds, 3)}
        row |= {f"train/{name}_loss": float(value) for name, value in zip(self.objective.names, trained.loss, strict=True)}
        if self.result:
            metrics = self.result.metrics()
            row |= {f"val/{name}_loss": float(value) for name, value in zip(self.criterion.names, self.result.loss, strict=True)}
            row |= {f"metrics/{_COLUMNS.get(name, name)}": value for name, value in metrics.items()}
            info(f"  val: P {metrics['precision']:.3f}  R {metrics['recall']:.3f}  mAP50 {metrics['mAP50']:.4f}  mAP50-95 {metrics['mAP50-95']:.4f}"
                 f"  ({seconds:.0f} s, {trained.images_per_second:.0f} img/s, peak {peak_memory_bytes(self.device) / 2**30:.2f} GB)")
        row |= {f"x/lr{n}": group["lr"] for n, group in enumerate(self.stepper.optimizer.param_groups)}
        if slimming := self.sparsity.slimming:
            row["slim/near_zero"] = slimming.sparsity()
            self.state.gammas.append(slimming.histogram())
            info(f"  slimming: {100 * row['slim/near_zero']:.1f} % of the scales are nearly zero")
        self.state.history.append(row)
        self.scalars.add(epoch, row)
        write_results(self.run_dir / "results.csv", self.state.history)

    def _keep_best(self, epoch: int) -> None:
        if not self.result:
            return
        fitness = self.result.fitness
        # Where nothing is found yet the latest network is the best, and patience has not begun.
        if fitness > self.state.best_fitness or fitness == self.state.best_fitness == 0:
            self.state.best_fitness, self.state.best_epoch = fitness, epoch
            if not self.config.nosave:
                self._save_best()

    def _is_over(self, epoch: int) -> bool:
        config, state = self.config, self.state
        if config.time_limit and state.seconds + state.seconds / (epoch + 1) / 2 > config.time_limit * 60:  # another epoch would end further off
            info(f"time limit of {config.time_limit:g} minutes reached with epoch {epoch + 1}, after {state.seconds / 60:.1f}")
            return True
        if config.patience and self.result and epoch - state.best_epoch >= config.patience:
            info(f"no better fitness for {config.patience} epochs (best: epoch {state.best_epoch + 1}): stopped early; --patience 0 would go on")
            return True
        return False

    def _checkpoint(self, half: bool) -> Checkpoint:
        weights = self.stepper.ema.model.state_dict()
        metrics = self.result.metrics() if self.result else {}
        weights = for_inference(weights) if half else cast_floats(weights, torch.float32)
        return Checkpoint(self.model.spec.to_dict(), self.model.names, weights, metrics, self.config.imgsz, self.quantization is not None)

    def _save_best(self) -> None:
        """Always before last.pt: killed between the two, the resumed run repeats the epoch and writes the same best.pt.

        With --qat in full: in fp16 some weights would move to the next of their 128 steps.
        """
        save_checkpoint(self.run_dir / "weights" / "best.pt", self._checkpoint(half=self.quantization is None))

    def _save(self) -> None:
        state, weights_dir = self.state, self.run_dir / "weights"
        if state.finished and (self.config.nosave or state.best_fitness < 0):  # --noval and stopped early; what lies there is another run's
            self._save_best()
        if self.config.save_period > 0 and state.epoch % self.config.save_period == 0:
            save_checkpoint(weights_dir / f"epoch{state.epoch}.pt", self._checkpoint(half=self.quantization is None))
        state.model, state.optimizer = dict(self.model.state_dict()), self.stepper.optimizer.state_dict()
        if self.distillation:
            state.adapters = dict(self.distillation.adapters.state_dict())
        state.scaler, state.ema_updates = self.stepper.scaler.state_dict(), self.stepper.ema.updates
        checkpoint = self._checkpoint(half=False)
        checkpoint.training = state.to_dict()
        save_checkpoint(weights_dir / "last.pt", checkpoint)

    def _restore(self, state: TrainState) -> None:
        """Averaged weights are the checkpoint's own: `model` came with them; the raw ones replace them here."""
        self.stepper.ema.updates = state.ema_updates
        self.model.load_state_dict(state.model)
        if self.distillation:
            self.distillation.adapters.load_state_dict(state.adapters)
        load_optimizer(self.stepper.optimizer, state.optimizer)
        if state.scaler:  # of fp16; empty where the run computed in something else so far
            self.stepper.scaler.load_state_dict(state.scaler)
        if self.world.rank == 0:
            remove_leftovers(self.run_dir)
            remove_leftovers(self.run_dir / "weights")


def image_chances(split: Split, class_ap: Sequence[float]) -> np.ndarray:
    """(images,) by how many boxes of needy classes each holds: classes that score low, or are rare.

    Args:
        class_ap: 0..1 of each class; empty before the first validation.
    """
    nc = len(split.names)
    counts = np.stack([np.bincount(own[:, 0].astype(int), minlength=nc) for own in split.boxes])
    need = (1 - np.array(class_ap or np.zeros(nc))) ** 2 / np.maximum(counts.sum(0), 1)
    weights = counts @ need
    return weights + (weights.max() or 1.0) * 1e-3  # images without boxes stay possible


def _eta(state: TrainState, epochs: int, limit_s: float) -> str:
    if not state.epoch:
        return ""
    minutes = min(state.seconds / state.epoch * (epochs - state.epoch), (limit_s or math.inf) - state.seconds) / 60
    return f"ETA {max(minutes, 0):.0f} min" if minutes < 90 else f"ETA {minutes / 60:.1f} h"


def write_results(path: Path, history: list[dict[str, float]]) -> None:
    """results.csv from its rows: always whole, and the same after a resume. What there is none of, such as a mean over nothing, is left empty."""
    columns = list(dict.fromkeys(key for row in history for key in row))
    with atomic_write(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items() if not math.isnan(value)}
                         for row in history)
        file.flush()
        os.fsync(file.fileno())
