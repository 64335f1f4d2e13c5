"""Accumulators of wgmma between its issue and the `wgmma.wait_group` that covers it: nothing but another wgmma may use
them.

Copies (`mov`) only rename a register for the compiler and carry its state along. A ticket is the number of the group
that a register's latest wgmma belongs to, per warpgroup; groups complete in order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .ptx import Instr, Kernel, Reg, Vec

if TYPE_CHECKING:
    from .wave import Wave

Array = NDArray[Any]


def is_mma_async(instr: Instr) -> bool:
    return instr.opcode == "wgmma" and "mma_async" in instr.mods


def is_copy(instr: Instr) -> bool:
    return instr.opcode == "mov" and isinstance(instr.operands[0], Reg) and isinstance(instr.operands[1], Reg)


def accumulator_names(kernel: Kernel) -> frozenset[str]:
    """The registers that wgmma writes, and copies of them."""
    names: set[str] = set()
    for instr in kernel.instrs:
        if is_mma_async(instr) and isinstance(instr.operands[0], Vec):
            names |= {item.name for item in instr.operands[0].items if isinstance(item, Reg)}
    copies = [tuple(operand.name for operand in i.operands) for i in kernel.instrs if is_copy(i)] if names else []
    while new := {target for target, source in copies if source in names and target not in names}:
        names |= new
    return frozenset(names)


class InFlight:
    """The state of one wave's accumulators."""

    def __init__(self, wave: Wave, names: frozenset[str]) -> None:
        self.wave = wave
        warpgroups = wave.size // 128
        self.names = names
        self.ticket = {name: np.zeros(warpgroups, np.int64) for name in names}
        self.done = np.zeros(warpgroups, np.int64)
        self.latest = np.zeros(warpgroups, np.int64)

    def reset(self) -> None:
        for array in (*self.ticket.values(), self.done, self.latest):
            array[:] = 0

    def issue(self, names: list[str], group: int, ticket: int) -> None:
        """A wgmma of warpgroup `group` writes these registers."""
        self.latest[group] = ticket
        for name in names:
            self.ticket[name][group] = ticket

    def use(self, instr: Instr, reads: set[str], mask: Array | None) -> Array:
        """Warpgroups that execute `instr`; a fault where it reads what is in flight."""
        rows = np.ones(self.done.size, bool) if mask is None else mask.reshape(-1, 128).any(axis=1)
        groups: Array = rows.nonzero()[0]
        if (self.latest[groups] > self.done[groups]).any():
            for name in reads:
                late = self.ticket[name][groups] > self.done[groups]
                if late.any():
                    group = int(groups[late.argmax()])
                    thread = group * 128 if mask is None else int(group * 128 + mask[group * 128 :].argmax())
                    detail = f"{name} is an accumulator of a wgmma that no wgmma.wait_group has covered yet"
                    raise self.wave.fault("async-race", detail, instr, thread)
        return groups

    def write(self, names: set[str], groups: Array, source: str | None) -> None:
        """An ordinary instruction has written these registers; `source`: as a copy of this one."""
        for name in names:
            self.ticket[name][groups] = self.ticket[source][groups] if source else 0
