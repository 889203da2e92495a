"""Pictures: boxes on images (`images`, OpenCV alone), curves of a validation (`curves`) and of a training (`training`), both by Matplotlib."""
