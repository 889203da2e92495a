"""What a program is told, and what libraries keep to themselves meanwhile."""
from __future__ import annotations

import logging
import os
import sys
import threading

import pytest

from utils.log import no_output, silent_libraries


def test_two_threads_leave_the_programs_logging_as_it_was():
    """Each would bring back what the other had put in its place."""
    inside, leave, left = [threading.Event(), threading.Event()], threading.Event(), threading.Event()

    def first() -> None:
        with silent_libraries():
            inside[0].set()
            leave.wait(10)
        left.set()

    def second() -> None:
        with silent_libraries():
            inside[1].set()
            left.wait(10)

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    inside[0].wait(10)
    threads[1].start()
    assert not inside[1].wait(0.2)
    leave.set()
    for thread in threads:
        thread.join()
    assert logging.root.manager.disable == logging.NOTSET


@pytest.mark.parametrize(("descriptor", "name"), [(1, "stdout"), (2, "stderr")])
def test_a_program_without_streams(descriptor: int, name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """A service's are None; what its descriptors are by then is its own."""
    with no_output(descriptor):
        os.write(descriptor, b"hidden")
    monkeypatch.setattr(sys, name, None)
    with no_output(descriptor):
        os.write(descriptor, b"its own")
    assert "".join(capfd.readouterr()) == "its own"
