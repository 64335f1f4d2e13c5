"""The registers of wgmma: its accumulators, and A where it comes from registers.

Between a wgmma's issue and the `wgmma.wait_group` that covers it, nothing but another wgmma may use its accumulators. A
ticket is the number of the group that a register's latest wgmma belongs to, per warpgroup; groups complete in order.
Between any other instruction's use of a register and a wgmma's, the warpgroup must execute a `wgmma.fence`, and it must
have done so before its first wgmma.

Copies (`mov`) only rename a register for the compiler and carry its state along; constants may be moved anywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .ptx import Imm, Instr, Kernel, Reg, Vec

if TYPE_CHECKING:
    from .wave import Wave

Array = NDArray[Any]


def is_mma_async(instr: Instr) -> bool:
    return instr.opcode == "wgmma" and "mma_async" in instr.mods


def is_copy(instr: Instr) -> bool:
    return instr.opcode == "mov" and isinstance(instr.operands[0], Reg) and isinstance(instr.operands[1], Reg)


def is_constant(instr: Instr) -> bool:
    return instr.opcode == "mov" and isinstance(instr.operands[1], Imm)


def wgmma_registers(kernel: Kernel) -> frozenset[str]:
    """The accumulators and fragments of A, what they are copied from and copied to."""
    names: set[str] = set()
    for instr in filter(is_mma_async, kernel.instrs):
        for operand in instr.operands[:2]:
            if isinstance(operand, Vec):
                names |= {item.name for item in operand.items if isinstance(item, Reg)}
    copies = [{operand.name for operand in i.operands} for i in kernel.instrs if is_copy(i)] if names else []
    while new := {name for pair in copies if pair & names for name in pair - names}:
        names |= new
    return frozenset(names)


class InFlight:
    """The state of one wave's registers of wgmma."""

    def __init__(self, wave: Wave, names: frozenset[str]) -> None:
        self.wave = wave
        warpgroups = wave.size // 128
        self.names = names
        self.ticket = {name: np.zeros(warpgroups, np.int64) for name in names}
        self.done = np.zeros(warpgroups, np.int64)
        self.latest = np.zeros(warpgroups, np.int64)
        self.used = {name: np.zeros(warpgroups, np.int64) for name in names}  # fences before the latest ordinary use
        self.fences = np.zeros(warpgroups, np.int64)

    def reset(self) -> None:
        for array in (*self.ticket.values(), self.done, self.latest, *self.used.values(), self.fences):
            array[:] = 0

    def issue(self, instr: Instr, accumulators: list[str], fragments: list[str], group: int, ticket: int) -> None:
        """A wgmma of warpgroup `group` writes `accumulators`, and takes A from `fragments` if not from memory."""
        for name in (*accumulators, *fragments):
            if self.used[name][group] == self.fences[group]:
                since = f"the last use of {name}" if self.fences[group] else "the kernel began"
                detail = f"the warpgroup has executed no wgmma.fence since {since}"
                raise self.wave.fault("async-race", detail, instr, group * 128)
        self.latest[group] = ticket
        for name in accumulators:
            self.ticket[name][group] = ticket

    def use(self, instr: Instr, reads: set[str], mask: Array | None, *, is_copied: bool) -> Array:
        """Warpgroups that execute `instr`; a fault where it reads what is in flight."""
        rows = np.ones(self.done.size, bool) if mask is None else mask.reshape(-1, 128).any(axis=1)
        groups: Array = rows.nonzero()[0]
        if is_copied:
            return groups
        if (self.latest[groups] > self.done[groups]).any():
            for name in reads:
                late = self.ticket[name][groups] > self.done[groups]
                if late.any():
                    group = int(groups[late.argmax()])
                    thread = group * 128 if mask is None else int(group * 128 + mask[group * 128 :].argmax())
                    detail = f"{name} is an accumulator of a wgmma that no wgmma.wait_group has covered yet"
                    raise self.wave.fault("async-race", detail, instr, thread)
        for name in reads:
            self.used[name][groups] = self.fences[groups]
        return groups

    def write(self, instr: Instr, names: set[str], groups: Array, source: str | None) -> None:
        """An ordinary instruction has written these registers; `source`: as a copy of this one."""
        for name in names:
            self.ticket[name][groups] = self.ticket[source][groups] if source else 0
            if source:
                self.used[name][groups] = self.used[source][groups]
            elif not is_constant(instr):
                self.used[name][groups] = self.fences[groups]
