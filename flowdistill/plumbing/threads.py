"""Work in another thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def in_thread(do: Callable[[], T]) -> Future[T]:
    """Begin to do something in a thread of its own; the future has its result, or its error.

    The end of the process does not wait for it.

    Examples:
        >>> in_thread(lambda: 2 + 2).result()
        4
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(do())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future
