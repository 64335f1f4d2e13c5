"""Who runs next: threads at the same basic block form a group; the group with the lowest block runs until its block
ends.

Lowest-block-first (min-PC) reconverges structured code. A block with warp-collective instructions waits for those lanes
of its warps that can still reach it, the head of a loop for those still in an iteration. A group that keeps the
machine to itself (a spin loop) is set aside from time to time. Threads that wait for an mbarrier are left alone until
it flips; only when nobody else can run does their try_wait return false, and after STALLS such attempts they are in a
deadlock.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .barriers import ClusterBarriers, NamedBarriers
from .isa import hopper
from .memory import Bad
from .program import Block
from .ptx import Instr, Reg
from .wave import Wave

Array = NDArray[Any]

STALLS = 200  # failed mbarrier waits in a row, nothing else being able to run
BLOCK_BUDGET = 4_000_000
PATIENCE = 4000  # block executions before a group that keeps running yields to the others


class Scheduler:
    """Runs a started wave to its end."""

    def __init__(self, wave: Wave) -> None:
        self.wave = wave
        self.groups: dict[int, Array] = {0: ~wave.exited}
        self.barriers = NamedBarriers(self)
        self.cluster_barriers = ClusterBarriers(self)
        self.predicates = [
            wave.regs[b.terminator.pred.name] if b.terminator is not None and b.terminator.pred is not None else None
            for b in wave.program.blocks
        ]
        self.stall = (0, 0)
        self.spins = 0
        self.aside: Array | None = None

    def run(self) -> None:
        budget = BLOCK_BUDGET
        wave = self.wave
        blocks, program = wave.blocks, wave.program.blocks
        counters = self.wave.counters
        while self.groups or self.barriers.waiting or self.cluster_barriers.waiting:
            if not self.groups:
                raise self.barriers.deadlock() if self.barriers.waiting else self.cluster_barriers.deadlock()
            index, mask, active = self._pick()
            full, masked = blocks[index]
            if active == self.wave.size:
                for step in full:
                    step()
            else:
                self.wave.mask[:] = mask
                for step in masked:
                    step()
            counters.warp_instructions += (len(full) + 1) * (active >> 5 or 1)
            self._leave(index, program[index], mask, active)
            budget -= 1
            if budget == 0:
                block = program[index]  # one without instructions may branch to itself
                where = block.instrs[0] if block.instrs else block.terminator
                raise self.wave.fault("no-progress", f"{BLOCK_BUDGET} blocks executed", where, int(mask.argmax()))

    def _pick(self) -> tuple[int, Array, int]:
        """The next group to run: block, mask, number of active threads."""
        groups = self.groups
        if len(groups) == 1 and not self.wave.polls:
            self.spins = 0
            self.aside = None
            ((index, mask),) = groups.items()
            groups.clear()
            return index, mask, int(np.count_nonzero(mask))
        self.spins += 1
        if self.spins > PATIENCE and self.aside is not None:
            self.spins, self.aside = 0, None
        held = polling = None
        for index in sorted(groups):
            mask = groups[index]
            if self.aside is not None:
                mask = mask & ~self.aside
                if not mask.any():
                    continue
            block = self.wave.program.blocks[index]
            ready = self._ready(index, block, mask) if block.collective or block.loop else mask
            if index in self.wave.polls:
                threads = ready.nonzero()[0]
                passing = self.wave.polls[index](threads)
                if not passing.all():
                    polling = polling or (index, mask)
                    ready = ready.copy()
                    ready[threads[~passing]] = False
            elif held is None:
                held = (index, mask)
            if ready.any():
                if self.spins > PATIENCE:
                    self.spins, self.aside = 0, np.repeat(ready.reshape(-1, 32).any(axis=1), 32)
                    return self._pick()
                return self._take(index, ready)
        if self.aside is not None:  # nobody else can run: start over
            self.aside = None
            return self._pick()
        if held is not None:
            return self._take(*held)
        assert polling is not None
        return self._stalled(*polling)

    def _stalled(self, index: int, mask: Array) -> tuple[int, Array, int]:
        """Nobody can run but threads whose mbarrier wait fails. They may have something else to do: let the wait
        fail.
        """
        events, count = self.stall
        self.stall = (self.wave.events, count + 1 if events == self.wave.events else 0)
        if self.stall[1] > STALLS:
            instr, thread = self.wave.program.blocks[index].instrs[0], int(mask.argmax())
            detail = "no thread can run; " + hopper.explain(self.wave, instr, thread)
            raise self.wave.fault("deadlock", detail, instr, thread)
        return self._take(index, mask)

    def _take(self, index: int, mask: Array) -> tuple[int, Array, int]:
        left = self.groups.pop(index) & ~mask
        if left.any():
            self.groups[index] = left
        return index, mask, int(np.count_nonzero(mask))

    def _ready(self, index: int, block: Block, mask: Array) -> Array:
        """The part of a group whose warps have no lane elsewhere that should come here first.

        Those are, for a collective block, lanes that can reach it without going around a loop, and for the head of a
        loop, lanes that are still in an iteration.
        """
        width = 128 if block.collective == 128 and self.wave.padded % 128 == 0 else 32
        coming = np.zeros(self.wave.size // width, bool)
        for other, lanes in self.groups.items():
            ahead = block.collective and self.wave.program.blocks[other].ahead >> index & 1
            if other != index and (ahead or block.loop >> other & 1):
                coming |= lanes.reshape(-1, width).any(axis=1)
        return mask & ~np.repeat(coming, width) if coming.any() else mask

    def go(self, index: int, mask: Array) -> None:
        present = self.groups.get(index)
        self.groups[index] = mask if present is None else present | mask

    def _leave(self, index: int, block: Block, mask: Array, active: int) -> None:
        terminator: Instr | None = block.terminator
        if terminator is None:
            self.go(index + 1, mask)
            return
        opcode = terminator.opcode
        pred = self.predicates[index]
        taken = mask
        if pred is not None:
            assert terminator.pred is not None
            taken = mask > pred if terminator.pred.negated else mask & pred
        if opcode == "bra":
            hits = active if pred is None else int(np.count_nonzero(taken))
            if hits:
                self.go(block.successors[0], taken)
            if hits < active:
                self.go(block.successors[1], mask > taken if hits else mask)
        elif opcode in ("ret", "exit"):
            self.wave.exited |= taken
            if self.wave.cluster > 1:
                self._exit(terminator)
            if pred is not None and not np.array_equal(taken, mask):
                self.go(index + 1, mask & ~taken)
            self.barriers.settle()
            self.cluster_barriers.settle()
        elif opcode in ("bar", "barrier"):
            if pred is not None and not np.array_equal(taken, mask):
                self.go(index + 1, mask & ~taken)
            if taken.any():
                self._check_aligned(terminator, taken)
                kind = self.cluster_barriers if terminator.mods[:1] == ("cluster",) else self.barriers
                kind.execute(terminator, index, taken)
        elif opcode == "trap":
            if taken.any():
                raise self.wave.fault("trap", "trap executed", terminator, int(taken.argmax()))
            self.go(index + 1, mask)
        elif opcode == "brx":
            self._indexed(terminator, block, taken)

    def _exit(self, instr: Instr) -> None:
        """CTAs none of whose threads is left exit."""
        shared = self.wave.shared
        gone = self.wave.exited.reshape(self.wave.ctas, -1).all(axis=1) & ~shared.left
        try:
            shared.leave(np.flatnonzero(gone))
        except Bad as bad:
            raise self.wave.fault(bad.kind, bad.detail, instr, bad.lane) from None

    def _indexed(self, instr: Instr, block: Block, mask: Array) -> None:
        register = instr.operands[0]
        assert isinstance(register, Reg)
        choice = self.wave.regs[register.name]
        for i, target in enumerate(block.successors):
            part = mask & (choice == i)
            if part.any():
                self.go(target, part)

    def _leaving(self) -> Array:
        """Threads that have exited, or whose next instruction is the exit: an early return before a barrier is
        legal.
        """
        gone = self.wave.exited
        for index, mask in self.groups.items():
            block = self.wave.program.blocks[index]
            if (
                not block.instrs
                and block.terminator is not None
                and block.terminator.opcode in ("ret", "exit")
                and block.terminator.pred is None
            ):
                gone = gone | mask
        return gone

    def _check_aligned(self, instr: Instr, mask: Array) -> None:
        if instr.opcode != "bar" and "aligned" not in instr.mods:
            return
        lanes = mask.reshape(-1, 32)
        partial = lanes.any(axis=1) & ~(lanes | self._leaving().reshape(-1, 32)).all(axis=1)
        if partial.any():
            warp = int(partial.argmax())
            missing = np.flatnonzero(~(lanes[warp] | self.wave.exited[warp * 32 : warp * 32 + 32]))
            detail = f"lanes {missing.tolist()} of the warp do not execute it"
            raise self.wave.fault("divergent-aligned", detail, instr, int(lanes[warp].argmax()) + warp * 32)
