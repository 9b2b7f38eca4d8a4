"""The most memory that a call holds above what was held before it, as the system counts it. Linux only."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def can_measure() -> bool:
    """Whether the system tells."""
    return STATUS.exists() and CLEAR.exists()


def peak_of(call: Callable[[], object]) -> int:
    """Bytes of resident memory that a call, made once here and now, adds at its peak."""
    gc.collect()  # else garbage of before may go during the call, and hide what the call holds
    _give_back_free_memory()  # else the call may use it, and add nothing
    CLEAR.write_text("5")  # the high-water mark starts again from what is resident
    before = _resident("VmRSS")
    result = call()
    after = _resident("VmHWM")
    del result
    return max(after - before, 0)


def peak_in_new_process(prepare: Callable[[], Callable[[], object]]) -> int:
    """peak_of(prepare()) in a process of its own, where nothing was allocated before that could be used again."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_peak, args=(sender, prepare))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError("the process that measures memory failed") from None
    finally:
        process.join()


def _send_peak(sender: Connection, prepare: Callable[[], Callable[[], object]]) -> None:
    sender.send(peak_of(prepare()))


def _give_back_free_memory() -> None:
    """Has the C library return what it keeps of freed memory to the system; glibc alone keeps much, and can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
