"""Data-parallel ranks take one decision for a layer shape, whoever meets it first.

The decision is published in the key-value store that torch.distributed set itself up with: the first rank to write it
wins, and the others take what is there. No rank ever waits for another, so ranks may see a shape at different moments,
inside a backward pass, or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from sdgp_accel.backends import warn_once

PREFIX = "sdgp_accel/"


def agreed(key: str, propose: Callable[[], str]) -> str:
    """The value that every rank of the default process group has for `key`: what the first of them proposed.

    `propose` is only called where no rank has been faster. In one process it is what it proposes.
    """
    store = _store()
    if store is None:
        return propose()
    key = PREFIX + key
    try:
        if store.check([key]):
            return str(store.get(key).decode())
    except (RuntimeError, NotImplementedError) as error:  # torch.distributed's own errors are RuntimeErrors
        return _disagree(error, propose())
    value = propose()
    try:
        # The store keeps an older value, and returns what it holds.
        return str(store.compare_set(key, "", value).decode())
    except (RuntimeError, NotImplementedError) as error:
        return _disagree(error, value)


def _disagree(error: Exception, value: str) -> str:
    warn_once(f"ranks cannot agree on measured choices, each keeps its own: {error}")
    return value


def _store() -> Any:
    """The default process group's; None in one process."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        if os.environ.get("WORLD_SIZE", "") not in ("", "0", "1"):
            warn_once(
                "a layer was tuned before torch.distributed.init_process_group: ranks may choose differently; "
                "call sdgp_accel.tune after it"
            )
        return None
    if distributed.get_world_size() == 1:
        return None
    return distributed.distributed_c10d._get_default_store()
