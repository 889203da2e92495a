"""--view-img: results in a window while they come."""
from __future__ import annotations

import subprocess
import sys

import cv2
import numpy as np

from utils.errors import UserError

_PROBE = "import cv2; cv2.namedWindow('probe'); cv2.waitKey(1)"
_TITLE = "detections (q ends)"
_TICK_MS = 50


def check_display() -> None:
    """Raises UserError where no window can be opened. Tried in a process of its own: without a display Qt ends the process that asks."""
    try:
        shown = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, timeout=20).returncode == 0
    except subprocess.TimeoutExpired:
        shown = False
    if not shown:
        raise UserError("--view-img: no window can be opened here (no display, or opencv-python-headless): leave it out and look at the saved files")


def show(image: np.ndarray, wait: bool) -> bool:
    """Show an image, until a key is pressed if `wait`; False when the user pressed q or Esc."""
    cv2.imshow(_TITLE, image)
    key = cv2.waitKey(1)
    while wait and key < 0 and cv2.getWindowProperty(_TITLE, cv2.WND_PROP_VISIBLE) >= 1:
        key = cv2.waitKey(_TICK_MS)  # not 0: it would not hear Ctrl-C
    return key & 0xFF not in (ord("q"), 27)
