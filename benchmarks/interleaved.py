"""Workloads timed in processes of their own, in turn, so that allocator, threads and the hour's mood are the same for none and fair to all."""
from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

_MARK = "RESULT "


def report(**figures: float | str) -> None:
    """In a child: hand figures to the parent."""
    print(_MARK + json.dumps(figures), flush=True)


def run_in_turn(module: str, modes: Sequence[str], arguments: Sequence[str], repeats: int) -> dict[str, list[dict[str, Any]]]:
    """`python -m module --only MODE …` for each mode, `repeats` rounds; what each `report`ed."""
    results: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes}
    for n in range(repeats):
        for mode in modes:
            print(f"round {n + 1}/{repeats}: {mode} …", file=sys.stderr, flush=True)
            # Ours run as the scripts do (utils/threads.py); the plain ones with the library's defaults.
            environment = os.environ | ({} if mode == "plain" else {"OMP_WAIT_POLICY": "passive"})
            done = subprocess.run([sys.executable, "-m", module, "--only", mode, *arguments], capture_output=True, text=True, env=environment)
            lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
            if done.returncode or not lines:
                raise SystemExit(f"{mode} failed:\n{done.stderr[-2000:]}")
            results[mode].append(json.loads(lines[-1].removeprefix(_MARK)))
    return results


def median(results: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.median(result[key] for result in results)


def print_table(results: dict[str, list[dict[str, Any]]], keys: Sequence[str], compared: str) -> None:
    """A row for each mode: medians, the spread of `compared`, and its ratio to the first mode's, round by round."""
    reference = [result[compared] for result in next(iter(results.values()))]
    print(f"{'work':34}" + "".join(f"{key:>16}" for key in keys) + f"{'min - max':>18}{'of plain':>10}")
    for mode, runs in results.items():
        values = [run[compared] for run in runs]
        ratio = statistics.median(value / plain for value, plain in zip(values, reference, strict=True))
        cells = "".join(f"{median(runs, key):16.2f}" if key in runs[0] else f"{'':16}" for key in keys)
        print(f"{mode:34}{cells}{f'{min(values):.1f} - {max(values):.1f}':>18}{ratio:10.2f}")
    print(next(iter(results.values()))[0]["machine"])
