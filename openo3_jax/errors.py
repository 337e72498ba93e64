"""The user's mistakes: one line that says what, where, got, expected and what to do."""


class InputError(ValueError):
    """Something the user gave cannot be used. The command line prints it as one line and exits with 2.

    Example: `InputError("clip.mp4: holds 1 frame; a video needs at least 2; pass it as an image instead")`
    """


class Stopped(Exception):
    """A signal ended the work, and its state is saved. The command line prints it as one line and exits with 75."""
