"""Processes that share a pass over a corpus: how they are started, and how they end when one of them is killed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from cpdlm.config import ConfigError


def process_count(wanted: int) -> int:
    """data.processes as a number: 0 stands for the cores that this process may use."""
    return wanted or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@contextlib.contextmanager
def processes(count: int, prepare: Callable[..., None], *arguments: Any) -> Iterator[ProcessPoolExecutor]:
    """`count` fresh processes, each of which first calls prepare(*arguments).

    They end with this one, however it ends. Raises ConfigError where one is killed, whose work is lost; what does not depend
    on it stays.
    """
    pool = ProcessPoolExecutor(
        count, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(prepare, arguments)
    )
    try:
        yield pool
    except BrokenProcessPool as error:
        raise ConfigError(
            f"one of data.processes={count} processes was killed (out of memory?). The same command goes on behind the pieces "
            f"that are finished; data.processes={max(1, count // 2)} needs less memory"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(prepare: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare(*arguments)


def _end_with_parent() -> None:
    """A process pool outlives a parent that is killed: its queue is never closed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
