"""A pruning from its settings to the channels that stay."""
from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.compress.calibration import FEWEST
from utils.compress.eagleeye import Candidate, Search
from utils.compress.graph import ChannelGraph
from utils.compress.importance import fpgm, gamma, l1, l2
from utils.compress.norms import reestimate_norms
from utils.compress.plan import (
    Cost,
    Limits,
    Plan,
    best_of,
    check_reachable,
    fill,
    global_threshold,
    macs_share,
    meet,
    parameters_share,
    random_shares,
    uniform,
)
from utils.config import PruneConfig
from utils.data.dataset import TrainDataset, scaled_sizes
from utils.data.imagecache import ImageCache, memory_limit
from utils.data.labels import Split
from utils.data.loader import EpochBatches, make_loader
from utils.data.open import val_loader
from utils.device import PRECISION, compute_dtype
from utils.errors import UserError
from utils.evaluate.validate import validate
from utils.files import read_yaml, write_yaml
from utils.hyp import Hyp
from utils.log import info, warn
from utils.network import to_input

_IMPORTANCE = {"eagleeye": l1, "l1": l1, "fpgm": fpgm, "sfp": l2, "slimming": gamma}
_BATCH = 16
_PLANS = 5  # of a search's best that are kept
_LATENCY_NOISE = 0.03
_RATIO_MAY_DIFFER = 0.05


def check_settings(config: PruneConfig) -> None:
    """Refuse what says too little or too much of how far to go.

    Raises:
        UserError: naming the flags.
    """
    given = [flag for flag in ("target_flops", "target_params", "target_latency", "ratio", "plan") if getattr(config, flag)]
    if len(given) != 1:
        also = " and ".join(f"--{flag.replace('_', '-')}" for flag in given)
        raise UserError(f"say how far to go by one flag, {f'not by {also}' if given else 'such as --target-flops 0.5 or --ratio 0.3'}")
    # Of a search's plan the held-out images still decide which others its norms are estimated on.
    idle = () if _searches(config) else ("candidates",) if config.method == "eagleeye" else ("candidates", "held_out")
    for name in idle:
        if getattr(config, name) != getattr(PruneConfig, name):
            what = "--plan" if config.plan else f"--method {config.method}"
            raise UserError(f"--{name.replace('_', '-')}: is of eagleeye's search, and {what} tries nothing: leave it out")
    if not config.data and config.calib != PruneConfig.calib:
        raise UserError("--calib: batch norms are re-estimated on training images: name them with --data, or leave it out")
    if _searches(config):
        if config.ratio:
            raise UserError("--ratio says nothing to --method eagleeye, which tries plans of one budget: give --target-flops, or --method l1")
        if not config.data:
            raise UserError("--method eagleeye scores its plans on training images: name them with --data")


class Slices(NamedTuple):
    """Training images that a pruning looks at."""

    estimation_split: Split
    estimation: list[Tensor]  # its batches (B, 3, H, W) uint8 for the batch norms, augmented
    held_out: list[Any]  # batches to score on, letterboxed
    held_out_split: Split
    imgsz: int


def open_slices(split: Split, config: PruneConfig, imgsz: int, stride: int) -> Slices:
    """`--calib` and, for a search, `--held-out` images of a training split, none in both, drawn by `--seed`.

    Raises:
        UserError: the split has too few images.
    """
    total, first, searches = len(split.images), config.calib, _searches(config)
    least = 2 * FEWEST if searches else FEWEST
    if total < least:
        what = "to re-estimate batch norms on some and score on others" if searches else "to re-estimate batch norms on"
        raise UserError(f"{config.data}: its {total} training images are too few {what}: {least} is the least"
                        f"{'' if searches else '; without --data norms stay as they are'}")
    if config.method == "eagleeye" and (wanted := first + config.held_out) > total:  # a plan's norms, too, are those that its search gave it
        first = max(FEWEST, min(total - FEWEST, round(total * first / wanted)))
        if searches:
            info(f"{total} training images: {first} for the batch norms and {total - first} to score on")
    order = np.random.default_rng(config.seed).permutation(total).tolist()
    own, held = split.take(order[:first]), split.take(order[first : first + config.held_out] if searches else [])
    held_batches = list(val_loader(held, imgsz, _even(len(held.images)), stride, 0, torch.device("cpu"))) if held.images else []
    return Slices(own, _augmented(own, imgsz, config.seed), held_batches, held, imgsz)


def _augmented(split: Split, imgsz: int, seed: int) -> list[Tensor]:
    """Batches (B, 3, imgsz, imgsz) uint8, as a training with the default hyperparameters sees them.

    A network expects its norms' statistics of those, and mosaics have others than plain images.
    """
    images = ImageCache(scaled_sizes(split, imgsz), "auto", memory_limit("auto", 1))
    dataset = TrainDataset(split, imgsz, Hyp(), images, seed)
    order = EpochBatches(np.arange(len(dataset)), _even(len(dataset)))
    return [batch.images for batch in make_loader(dataset, order, 0, pin_memory=False)]


def _even(images: int) -> int:
    """A batch size that leaves no small batch: each has the same say in a batch norm's mean."""
    return math.ceil(images / math.ceil(images / _BATCH))


def _searches(config: PruneConfig) -> bool:
    return config.method == "eagleeye" and not config.plan


class Pruning:
    """Chooses what stays of one network.

    Args:
        model: with its spec, names and `fused()`; on its device, in eval mode.
        remove: (graph's model, graph, keep) -> the network that is left.
        slices: None: nothing is scored or re-estimated.
        latency: a choice's measured latency as a share of the whole network's.

    Raises:
        UserError: what is asked for can't be done with this network.
    """

    def __init__(self, config: PruneConfig, model: Any, graph: ChannelGraph, remove: Callable[..., Any], slices: Slices | None,
                 latency: Callable[[np.ndarray], float]) -> None:
        self.config, self.model, self.graph, self.slices = config, model, graph, slices
        self._remove = remove
        self.limits = Limits(config.min_ratio, config.round_to)
        if broken := next((key for key, tensor in model.state_dict().items() if tensor.is_floating_point() and not tensor.isfinite().all()), ""):
            raise UserError(f"{config.weights}: {broken} holds NaN or infinity: take an earlier checkpoint")
        self.scores = _IMPORTANCE[config.method](graph, model.state_dict())
        trained = [key for key, _ in model.named_parameters()]
        self.costs: dict[str, Cost] = {"flops": macs_share(graph, self.scores), "params": parameters_share(graph, self.scores, trained),
                                       "latency": lambda plan: latency(best_of(graph, plan, self.scores))}
        self.device = next(model.parameters()).device
        self.dtype = compute_dtype(config.precision, self.device)  # of scoring
        self.candidates: list[Candidate] = []  # of a search, the best first
        self._make = global_threshold(graph, self.limits, self.scores) if config.method == "slimming" else uniform(graph, self.limits)
        self.plan = self._read_plan(Path(config.plan)) if config.plan else None
        self._check()

    def run(self, folder: Path) -> tuple[Plan, Any]:
        """What each group keeps, and the network that is left, its batch norms re-estimated where there is data.

        Args:
            folder: for a search's candidates and its best plans.
        """
        plan = self.plan or (self._search(folder) if _searches(self.config) else self._by_importance())
        return plan, self.left(plan)

    def left(self, plan: Plan) -> Any:
        model = self._remove(self.model, self.graph, best_of(self.graph, plan, self.scores))
        if self.slices:
            reestimate_norms(model, (to_input(images, self.device) for images in self.slices.estimation))
        return model

    def score(self, model: Any) -> float:
        """mAP50-95 on the held-out slice."""
        network = model.fused().to(self.device, memory_format=torch.channels_last)
        slices = self.slices
        result = validate(network, slices.held_out, slices.held_out_split, self.device, self.dtype, single_cls=self.config.single_cls)
        return float(np.nan_to_num(result.scores.ap))

    def _check(self) -> None:
        config = self.config
        if not self.graph.groups:
            raise UserError(f"{config.weights}: no channel of this network can be removed")
        if not any(np.isfinite(scores).all() for scores in self.scores.values()):
            raise UserError(f"{config.weights}: --method slimming compares the scales of batch norms, and no removable channel passes one: "
                            "try --method l1")
        if not config.plan and not config.ratio:
            kind, target = self._budget()
            if kind != "latency":
                check_reachable(self.costs[kind](self._make(0.0)), target, f"--target-{kind}")
            elif not _searches(config):  # a search measures it once
                self._least_latency(target)
        if config.ratio:
            self._check_ratio(self._make(1 - config.ratio))

    def _least_latency(self, target: float) -> float:
        """Of the least plan; refused where that is too slow."""
        least = self.costs["latency"](self._make(0.0))
        check_reachable(least, target, "--target-latency", _LATENCY_NOISE)
        return least

    def _check_ratio(self, plan: Plan) -> None:
        total = sum(len(group.channels) for group in self.graph.groups)
        gone, asked = 1 - sum(plan.values()) / total, self.config.ratio
        also = ", and of layers without a batch norm, or of equal scales, none go" if self.config.method == "slimming" else ""
        if not gone:
            raise UserError(f"--ratio {asked:g}: removes no channel: at least --min-ratio {self.limits.least:g} of a layer stays, rounded to "
                            f"multiples of {self.limits.round_to}{also}: give a larger --ratio, a smaller --min-ratio or a smaller --round-to")
        if abs(gone - asked) > _RATIO_MAY_DIFFER:
            warn(f"--ratio {asked:g}: {gone:.2f} of the channels go with this --min-ratio and --round-to{also}")

    def _by_importance(self) -> Plan:
        if self.config.ratio:
            return self._make(1 - self.config.ratio)
        kind, target = self._budget()
        return self._within(self._make, kind, target)

    def _within(self, make: Callable[[float], Plan], kind: str, target: float) -> Plan:
        plan = meet(make, self.costs[kind], target)
        return plan if kind == "latency" else fill(self.graph, plan, self.costs[kind], target, self.limits)

    def _budget(self) -> tuple[str, float]:
        return next((kind, value) for kind in self.costs if (value := getattr(self.config, f"target_{kind}")))

    def _search(self, folder: Path) -> Plan:
        (kind, target), config = self._budget(), self.config
        settings = {"weights": digest(self.model.state_dict()), f"target-{kind}": target, "min-ratio": config.min_ratio, "round-to": config.round_to,
                    **self._drawn_by(), "norms": "augmented", "precision": PRECISION[self.dtype], "data": self.slices.held_out_split.fingerprint}
        search = Search(folder / "candidates.json", settings)
        for candidate in search.candidates:
            self._check_plan(candidate.plan, search.file)
        latency = target if kind == "latency" else None
        if latency:
            search.measure_once("least latency", lambda: self._least_latency(latency))
            # Too slow to be met by each candidate: those cost the FLOPs of the uniform plan that meets it.
            kind, target = "flops", search.measure_once("flops", lambda: self.costs["flops"](self._within(self._make, "latency", latency)))

        def draw(number: int) -> tuple[Plan, dict[str, float]]:
            maker = random_shares(self.graph, self.limits, np.random.default_rng((config.seed, number)))
            plan = self._within(maker, kind, target)
            return plan, {name: self.costs[name](plan) for name in ("flops", "params")}

        best = search.run(config.candidates, draw, lambda plan: self.score(self.left(plan)))
        if latency:
            chosen = self._fast_enough(best, latency, search)
            best = [chosen, *(candidate for candidate in best if candidate is not chosen)]
        for place, candidate in enumerate(best[:_PLANS], 1):
            write_yaml(folder / "plans" / f"{place}.yaml", {"search": self._drawn_by()} | _as_dict(candidate))
        self.candidates = best
        return best[0].plan

    def _fast_enough(self, best: Sequence[Candidate], latency: float, search: Search) -> Candidate:
        """The best candidate that is: of equal FLOPs they differ in latency."""
        shares: dict[int, float] = {}
        for candidate in best:
            share = search.measure_once(f"latency of {candidate.number}", functools.partial(self.costs["latency"], candidate.plan))
            if share <= latency:
                info(f"candidate {candidate.number}: the best that takes {latency:g} of the latency or less, {share:.2f}")
                return candidate
            shares[candidate.number] = share
        fastest = min(best, key=lambda candidate: shares[candidate.number])
        warn(f"no candidate takes {latency:g} of the latency or less: this is the fastest, {shares[fastest.number]:.2f}")
        return fastest

    def _read_plan(self, path: Path) -> Plan:
        content = read_yaml(path)
        plan, search = content.get("channels"), content.get("search")
        self._check_plan(plan, path)
        drawn_by = self._drawn_by() if self.slices and isinstance(search, dict) else {}
        if differing := [f"--{name} {search[name]}" for name, value in drawn_by.items() if search.get(name, value) != value]:
            raise UserError(f"{path}: was scored with {' '.join(differing)}: repeat these, so that its batch norms see the same images")
        return plan

    def _drawn_by(self) -> dict[str, int]:
        """What decides which images the batch norms see."""
        config = self.config
        held_out = {"held-out": config.held_out} if config.method == "eagleeye" else {}  # the others leave none of them out
        return {"seed": config.seed, "calib": config.calib, **held_out, "imgsz": self.slices.imgsz}

    def _check_plan(self, plan: Any, path: Path) -> None:
        groups = {group.name: len(group.channels) for group in self.graph.groups}
        if not isinstance(plan, dict) or set(plan) != set(groups):
            raise UserError(f"{path}: is no plan for this network: it needs 'channels:' with a number for each of its {len(groups)} groups of layers")
        for name, count in plan.items():
            if type(count) is not int or not 1 <= count <= groups[name]:
                raise UserError(f"{path}: channels of {name}: {count!r} is not between 1 and {groups[name]}")


def _as_dict(candidate: Candidate) -> dict[str, Any]:
    return {"candidate": candidate.number, "score": candidate.score, **candidate.costs, "channels": candidate.plan}


def digest(weights: Mapping[str, Tensor]) -> str:
    """Of a network's tensors and their names."""
    found = hashlib.sha256()
    for key, tensor in weights.items():
        found.update(key.encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
