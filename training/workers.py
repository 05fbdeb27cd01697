"""Work over several processes, which end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from adfeatures.errors import AdfeaturesError


@contextmanager
def mapper(workers: int) -> Iterator[Any]:
    """A function like ``map``, over processes where there are several."""
    if workers == 1:
        yield map
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker) as pool:
        try:
            yield partial(_in_order, pool)
        except BrokenProcessPool as error:
            raise AdfeaturesError(
                "A worker was killed, perhaps for lack of memory. Fewer workers resume from what is there."
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _in_order(pool: ProcessPoolExecutor, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
    # Not pool.map, which cancels what a broken pool is about to end: in Python 3.11 its thread dies of that.
    futures = [pool.submit(function, task) for task in tasks]
    return (future.result() for future in futures)


def _start_worker() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    # The main process ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
