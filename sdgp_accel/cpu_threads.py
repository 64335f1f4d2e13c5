"""Many pieces of work on a CPU, spread over as many Python threads as torch has threads.

torch spreads each operation over its threads and joins them after it. A rule made of a hundred short operations then
joins a hundred times per piece, and each join waits for the slowest core: on a busy machine two threads are slower
than one. Here each thread takes whole pieces and runs their operations by itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from sdgp_accel.group_rules import Scratch

Item = TypeVar("Item")

# So many at least where there are more than two threads: then the scratch of all threads together (about 6 times the
# values of a piece each) is no more than the tensor itself, however many threads there are.
PIECES_PER_THREAD = 8


def is_plain_cpu(x: Tensor) -> bool:
    """Whether x is real memory of a CPU: no subclass that stands for something else, and nothing being compiled."""
    return type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()


def for_each(items: Sequence[Item], work: Callable[[Item, Scratch], None], x: Tensor) -> None:
    """``work(item, scratch)`` for all `items`, in any order, a scratch for each thread.

    x: what is worked on. Threads are used where it is on a CPU (`is_plain_cpu`) and there is more than one item;
        meanwhile torch's number of threads is 1 in each of them.
    """
    threads = min(torch.get_num_threads(), len(items), max(2, len(items) // PIECES_PER_THREAD))
    if threads < 2 or not is_plain_cpu(x):
        scratch = Scratch(x.device)
        for item in items:
            work(item, scratch)
        return
    remaining = deque(items)

    def run() -> None:
        torch.set_num_threads(1)
        scratch = Scratch(x.device)
        with torch.inference_mode():  # a thread of its own starts outside it
            while remaining:
                try:
                    item = remaining.popleft()
                except IndexError:  # another thread took the last one
                    return
                work(item, scratch)

    own_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads - 1, "sdgp_accel") as pool:
            helpers = [pool.submit(run) for _ in range(threads - 1)]
            run()
        for helper in helpers:
            helper.result()
    finally:
        # Last, because the number is each thread's own but also the default of threads to come.
        torch.set_num_threads(own_threads)
