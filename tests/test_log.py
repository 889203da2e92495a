"""What a program is told, and what libraries keep to themselves meanwhile."""
from __future__ import annotations

import logging
import threading

from utils.log import silent_libraries


def test_two_threads_leave_the_programs_logging_as_it_was():
    """Each would bring back what the other had put in its place."""
    entered, leave = threading.Event(), threading.Event()

    def first() -> None:
        with silent_libraries():
            entered.set()
            leave.wait(10)

    def second() -> None:
        with silent_libraries():
            pass

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    entered.wait(10)
    threads[1].start()
    threads[1].join(0.2)  # it waits for the first; else it would have left first
    leave.set()
    for thread in threads:
        thread.join()
    assert logging.root.manager.disable == logging.NOTSET
