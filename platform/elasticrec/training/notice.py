"""A controller's word that a group is about to end in; whether this worker has saved everything out.

Ray ends a group that is to grow without a word, and what came after the newest checkpoint would be done again.
"""

import threading

WAIT_S = 60.0  # of a worker that has saved everything, for its end

_given, _saved = threading.Event(), threading.Event()


def give() -> bool:
    """Run in the worker's process by the controller; whether it has saved since."""
    _given.set()
    return _saved.is_set()


def is_given() -> bool:
    """Asked by the training thread at each meeting."""
    return _given.is_set()


def wait_for_the_end() -> None:
    """Everything is saved: this process is about to be ended. Returns when it is not."""
    _saved.set()
    threading.Event().wait(WAIT_S)


def has_saved() -> bool:
    """Run in the worker's process by the controller."""
    return _saved.is_set()
