"""A search goes on where it stopped, to the same end, and with its own settings only."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from utils.compress.eagleeye import Search
from utils.compress.pruning import Pruning
from utils.errors import UserError

SETTINGS = {"weights": "abc", "target-flops": 0.5, "seed": 0}
SCORES = (0.2, 0.5, 0.1, 0.5, 0.4)


def draw(number: int) -> tuple[dict[str, int], dict[str, float]]:
    return {"a.weight": number + 1}, {"flops": 0.5, "params": 0.1 * number}


def score(plan: dict[str, int]) -> float:
    assert not torch.is_grad_enabled()
    return SCORES[plan["a.weight"] - 1]


def test_the_best_come_first_and_of_equal_ones_the_earlier(tmp_path: Path):
    best = Search(tmp_path / "search.json", SETTINGS).run(5, draw, score)
    assert [candidate.number for candidate in best] == [1, 3, 4, 0, 2]
    assert best[0].plan == {"a.weight": 2} and best[0].costs == {"flops": 0.5, "params": 0.1} and best[0].score == 0.5


def test_an_interrupted_search_goes_on(tmp_path: Path):
    whole = Search(tmp_path / "whole.json", SETTINGS).run(5, draw, score)

    def interrupted(plan: dict[str, int]) -> float:
        if plan["a.weight"] == 3:
            raise KeyboardInterrupt
        return score(plan)

    file = tmp_path / "search.json"
    with pytest.raises(KeyboardInterrupt):
        Search(file, SETTINGS).run(5, draw, interrupted)
    scored = []
    again = Search(file, SETTINGS).run(5, draw, lambda plan: scored.append(plan["a.weight"] - 1) or score(plan))
    assert scored == [2, 3, 4] and again == whole
    assert file.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"search.json", "whole.json"}


def test_more_candidates_later_are_those_of_a_longer_search(tmp_path: Path):
    Search(tmp_path / "search.json", SETTINGS).run(2, draw, score)
    assert Search(tmp_path / "search.json", SETTINGS).run(5, draw, score) == Search(tmp_path / "long.json", SETTINGS).run(5, draw, score)


@pytest.mark.parametrize("best", [0.0, 0.03, 0.1])
def test_a_search_in_which_little_is_found_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str], best: float):
    found = Search(tmp_path / "search.json", SETTINGS).run(2, draw, lambda plan: best)
    assert [candidate.number for candidate in found] == [0, 1]
    assert (f"the best candidate's mAP is {best:.4f} on the held-out images" in capfd.readouterr().err) == (best < 0.05)


def test_what_is_measured_is_measured_once(tmp_path: Path):
    values = iter((0.3, 0.4))
    for _ in range(2):
        assert Search(tmp_path / "search.json", SETTINGS).measure_once("flops", lambda: next(values)) == 0.3


@pytest.mark.parametrize(("changed", "named"), [({"seed": 1}, "seed"), ({"weights": "x", "target-flops": 0.6}, "weights and target-flops"),
                                                ({"imgsz": 64}, "imgsz")])
def test_another_search_is_refused(tmp_path: Path, changed: dict, named: str):
    Search(tmp_path / "search.json", SETTINGS).run(1, draw, score)
    before = (tmp_path / "search.json").read_bytes()
    with pytest.raises(UserError, match=rf"search.json: is a search with another {named}: give another --name"):
        Search(tmp_path / "search.json", SETTINGS | changed)
    assert (tmp_path / "search.json").read_bytes() == before


@pytest.mark.parametrize("content", [
    "", "{", "[]", "3", "{}", b"\xff\xfe", {"candidates": 3}, {"candidates": [3]}, {"candidates": [{"number": 0}]}, {"settings": None},
    {"candidates": [{"number": "0", "plan": {}, "costs": {}, "score": 1}]},
    {"candidates": [{"number": 0, "plan": {"a": "b"}, "costs": {}, "score": 1}]},
    {"candidates": [{"number": 0, "plan": {"a": 1}, "costs": {"flops": None}, "score": 1}]},
    {"candidates": [{"number": 0, "plan": {"a": 1}, "costs": {}, "score": "high"}]}, {"measured": 5},
], ids=str)  # fmt: skip
def test_a_broken_file_is_refused(tmp_path: Path, content: object):
    if isinstance(content, dict) and content:
        content = json.dumps({"settings": SETTINGS, "measured": {}, "candidates": []} | content)
    (tmp_path / "search.json").write_bytes(content if isinstance(content, bytes) else str(content).encode())
    with pytest.raises(UserError, match=r"search.json: can't be read as a search .*: remove it to begin anew"):
        Search(tmp_path / "search.json", SETTINGS)


def test_the_best_that_meets_a_latency(tmp_path: Path, capsys):
    """Number 1 is the best, but slower than asked for; what was measured once counts when the search goes on."""
    search, asked = Search(tmp_path / "search.json", SETTINGS), []
    best = search.run(5, draw, score)
    pruning = object.__new__(Pruning)
    pruning.costs = {"latency": lambda plan: asked.append(plan) or {2: 0.6, 4: 0.48, 5: 0.3}.get(plan["a.weight"], 0.7)}
    assert pruning._fast_enough(best, 0.5, search).number == 3 and len(asked) == 2
    assert pruning._fast_enough(best, 0.5, Search(tmp_path / "search.json", SETTINGS)).number == 3 and len(asked) == 2
    assert pruning._fast_enough(best, 0.1, search).number == 4
    assert "no candidate takes 0.1 of the latency or less" in capsys.readouterr().err
