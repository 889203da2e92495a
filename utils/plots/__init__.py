"""Pictures by Matplotlib: curves of a validation (`curves`) and of a training (`training`), and the sheets of a run (`run`)."""
