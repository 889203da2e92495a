"""From frames to files: decoding, inference, drawing and encoding side by side, each in threads of its own with short queues between them."""
from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from tqdm import tqdm

from utils.data.sources import Frame, Source
from utils.deploy.predictor import Predictor
from utils.deploy.results import Result, Tally
from utils.deploy.window import show
from utils.deploy.writer import ResultWriter
from utils.errors import UserError
from utils.log import info, is_main_process


def detect(source: Source, predictor: Predictor, writer: ResultWriter, view: bool = False) -> Tally:
    """Every frame of the source through the predictor to the writer; both ends are closed when it returns or raises.

    Ctrl-C and a lost connection are how a live source ends: what was written of it is kept. Elsewhere what ends a run early leaves no
    half-written file.
    """
    start = time.perf_counter()
    with writer, source, predictor.runner.threads() as (pool, workers), _progress_bar() as bar:
        tally = Tally(predictor.names, workers)
        try:
            for frame, waited_ms, result in _in_order(source, predictor, pool, workers):
                writer.put(frame, result)
                tally.add(result, waited_ms)
                _advance(bar, frame, writer.outputs.vid_stride)
                if view and not show(result.plot(*writer.outputs.style), wait=frame.video is None):
                    break
        except (KeyboardInterrupt, UserError) as error:
            if not source.live or not tally.images:
                raise
            writer.close()
            if isinstance(error, UserError):
                raise
            info("stopped")
    tally.seconds = time.perf_counter() - start
    return tally


def _in_order(source: Source, predictor: Predictor, pool: ThreadPoolExecutor, workers: int) -> Iterator[tuple[Frame, float, Result]]:
    """Each frame, how long it was waited for in milliseconds, and its result, in the source's order while several are under way."""
    under_way: deque[tuple[Frame, float, Future[Result]]] = deque()
    start = time.perf_counter()
    for frame in source:
        under_way.append((frame, (time.perf_counter() - start) * 1e3, pool.submit(predictor, frame.image)))
        while under_way and (len(under_way) > workers or under_way[0][2].done()):
            yield _finished(under_way)
        start = time.perf_counter()
    while under_way:
        yield _finished(under_way)


def _finished(under_way: deque[tuple[Frame, float, Future[Result]]]) -> tuple[Frame, float, Result]:
    frame, waited_ms, future = under_way.popleft()
    return frame, waited_ms, future.result()


def _progress_bar() -> tqdm:
    return tqdm(desc="detect", unit=" images", leave=False, dynamic_ncols=True, mininterval=0.5, disable=not is_main_process())


def _advance(bar: tqdm, frame: Frame, vid_stride: int) -> None:
    """One image more; only a video tells how many are to come."""
    if frame.index == 0:
        bar.total = bar.n + -(-frame.video.frames // vid_stride) if frame.video and frame.video.frames else None
    bar.update()
