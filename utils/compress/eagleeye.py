"""EagleEye's search (Li et al., ECCV 2020): random plans within a budget, each scored as it is once its batch norms know it, none of them trained."""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from utils.compress.plan import Plan
from utils.errors import UserError
from utils.files import atomic_write
from utils.log import warn

_TELLING = 0.05  # mAP: where the best of a hundred stayed below, plans that were worse than uniform ones have won (docs/compression.md)


@dataclass(frozen=True)
class Candidate:
    number: int  # of its draw
    plan: Plan
    costs: Mapping[str, float]  # shares of the whole network's: flops, params
    score: float


class Search:
    """Candidates so far, in a file that is whole after each of them.

    Args:
        file: JSON; a search that it holds goes on.
        settings: what makes it this search: plain data.

    Raises:
        UserError: the file is of another search, or can't be read.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        self.file, self.settings = file, json.loads(json.dumps(settings))
        self.candidates: list[Candidate] = []
        self.measured: dict[str, float] = {}
        if file.exists():
            self._read()

    def measure_once(self, name: str, measure: Callable[[], float]) -> float:
        """What would come out otherwise each time, such as a latency: kept in the file."""
        if name not in self.measured:
            self.measured[name] = measure()
            self._write()
        return self.measured[name]

    def run(self, count: int, draw: Callable[[int], tuple[Plan, Mapping[str, float]]], score: Callable[[Plan], float]) -> list[Candidate]:
        """Score draws 0 to `count` - 1, those that are not yet; the best first.

        Args:
            draw: a number's plan and its costs.
            score: of a plan, the higher the better.
        """
        done = {candidate.number for candidate in self.candidates}
        bar = tqdm(range(count), desc="candidates", dynamic_ncols=True)
        for number in bar:
            if number not in done:
                plan, costs = draw(number)
                with torch.no_grad():
                    self.candidates.append(Candidate(number, plan, costs, score(plan)))
                self._write()
            best = self.best()[0]
            bar.set_postfix_str(f"best mAP {best.score:.4f} (number {best.number})")
        if self.best()[0].score < _TELLING:
            warn(f"the best candidate's mAP is {self.best()[0].score:.4f} on the held-out images, too little to tell plans apart: give a higher "
                 "--min-ratio (0.4), ask for less, or check --data")
        return self.best()

    def best(self) -> list[Candidate]:
        return sorted(self.candidates, key=lambda candidate: (-candidate.score, candidate.number))

    def _read(self) -> None:
        try:
            content = json.loads(self.file.read_text(encoding="utf-8"))
            self.candidates = [_candidate(candidate) for candidate in content["candidates"]]
            self.measured = {str(name): float(value) for name, value in content["measured"].items()}
            differing = [key for key in self.settings if content["settings"].get(key) != self.settings[key]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.file}: can't be read as a search ({error}): remove it to begin anew") from None
        if differing:
            raise UserError(f"{self.file}: is a search with another {' and '.join(differing)}: give another --name, or remove it to begin anew")

    def _write(self) -> None:
        content = {"settings": self.settings, "measured": self.measured, "candidates": [asdict(candidate) for candidate in self.candidates]}
        with atomic_write(self.file) as temporary:
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _candidate(content: Mapping[str, Any]) -> Candidate:
    """From JSON; ValueError, TypeError or KeyError where it is none."""
    number, plan, costs, score = (content[key] for key in Candidate.__dataclass_fields__)
    if type(number) is not int or any(type(count) is not int for count in plan.values()):
        raise ValueError(f"candidate {number!r} is none")
    return Candidate(number, dict(plan), {name: float(value) for name, value in costs.items()}, float(score))
