"""Signals: after OpenVINO, in a process of its own, which they kill where its models leave a freed signal stack behind; Ctrl-C."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from utils.deploy.writer import Outputs, ResultWriter

CODE = """
import gc, os, signal
import torch
from utils.measure.runtimes import RUNTIMES
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
openvino = next(runtime for runtime in RUNTIMES if runtime.name == "OpenVINO")
network, images = torch.nn.Conv2d(3, 8, 3).eval(), torch.rand(1, 3, 64, 64)
first, second = (openvino.prepare(network, images) for _ in range(2))
del first
gc.collect()
del second
gc.collect()
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_a_signal_after_openvino_does_not_kill():
    pytest.importorskip("openvino")
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", CODE], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "handled\n"), run.stderr


ASKED_TO_END = """
import os, signal, sys, time
from pathlib import Path
from utils.errors import script
from utils.files import atomic_write
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored
@script
def main(argv=None):
    begun, begins = os.pipe()
    worker = os.fork()
    if not worker:
        os.write(begins, b".")  # before, a signal may be forgotten
        time.sleep(60)
        os._exit(1)
    os.read(begun, 1)
    with atomic_write(Path("video.mp4")) as temporary:
        temporary.write_bytes(b"frames")
        try:
            os.kill(worker, signal.SIGTERM)
            print(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]), flush=True)
            os.kill(os.getpid(), int(sys.argv[1]))
            time.sleep(60)
        except KeyboardInterrupt:
            pass  # as detect.py ends a live source
    raise KeyboardInterrupt
code = main()
assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
raise SystemExit(code)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal there")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_an_end_that_is_asked_for_loses_nothing(name: str, tmp_path: Path):
    root = str(Path(__file__).parents[1])
    run = subprocess.run([sys.executable, "-c", ASKED_TO_END, str(int(getattr(signal, name)))], cwd=tmp_path,
                         env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True,
                         start_new_session=True, timeout=120)
    assert run.returncode == 2 and run.stderr.startswith("error: interrupted"), run.stderr
    assert run.stdout == "143\n", "a worker has nothing to end well"
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]


def test_what_is_being_written_ends_before_ctrl_c_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also while the writer is behind and has no room for the end."""
    written = []
    monkeypatch.setattr(ResultWriter, "_write", lambda self, frame, result, table: (time.sleep(0.1), written.append(frame)))
    writer = ResultWriter(lambda: tmp_path, Outputs())
    frames = list(range(5))
    for frame in frames[:-1]:
        writer.put(frame, None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timers = [threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT)) for after in (0.02, 0.15)]
    try:
        writer.put(frames[-1], None)
        for timer in timers:
            timer.start()
        with pytest.raises(KeyboardInterrupt):
            writer.close()
        assert written == frames
    finally:
        signal.signal(signal.SIGINT, before)
        for timer in timers:
            timer.join()
    writer.close()
