"""A parsed kernel as basic blocks, with the control-flow facts that the scheduler needs."""

from __future__ import annotations

from dataclasses import dataclass, field

from .in_flight import wgmma_registers
from .ptx import TYPE_BYTES, Instr, Kernel, PtxError, Sym, Variable

# Opcodes that end a block: control flow, and everything at which a thread may have to wait.
TERMINATORS = {"bra", "brx", "ret", "exit", "trap", "bar", "barrier"}
# Opcodes that involve the lanes of a warp together.
COLLECTIVE = {
    "bar",
    "barrier",
    "shfl",
    "vote",
    "match",
    "redux",
    "elect",
    "ldmatrix",
    "stmatrix",
    "mma",
    "movmatrix",
    "setmaxnreg",
}


@dataclass
class Block:
    index: int
    instrs: list[Instr]
    terminator: Instr | None
    successors: list[int] = field(default_factory=list)
    collective: int = 0  # threads that execute parts of it together: 0, a warp's 32 or a warpgroup's 128
    # Bit b: block b can be reached from here without going around a loop.
    ahead: int = 0
    # Bit b: block b belongs to a loop of which this block is the head.
    loop: int = 0


@dataclass
class Program:
    kernel: Kernel
    blocks: list[Block]
    shared: dict[str, int]  # name -> offset
    shared_static: int
    shared_extents: list[tuple[int, int]]
    dynamic_shared: list[str]
    local: dict[str, int]
    local_size: int
    params: dict[str, tuple[int, int]]  # name -> (offset, size)
    param_size: int
    granule: int  # bytes of the narrowest shared-memory access
    agents: bool  # whether TMA or tensor cores access shared memory by themselves
    wgmma_registers: frozenset[str]


def is_warp_sync(instr: Instr) -> bool:
    return instr.opcode == "bar" and instr.mods[:1] == ("warp",)


def is_poll(instr: Instr) -> bool:
    return instr.opcode == "mbarrier" and instr.mods[0] == "try_wait"


def _ends_block(instr: Instr) -> bool:
    return instr.opcode in TERMINATORS and not is_warp_sync(instr)


def _blocks(kernel: Kernel) -> list[Block]:
    leaders = {0, *kernel.labels.values()}
    leaders |= {i + 1 for i, instr in enumerate(kernel.instrs) if _ends_block(instr)}
    leaders |= {i for i, instr in enumerate(kernel.instrs) if is_poll(instr)}
    starts = sorted(s for s in leaders if s < len(kernel.instrs))
    number = {start: i for i, start in enumerate(starts)}
    blocks = []
    for i, start in enumerate(starts):
        end = starts[i + 1] if i + 1 < len(starts) else len(kernel.instrs)
        body = kernel.instrs[start:end]
        terminator = body.pop() if _ends_block(body[-1]) else None
        block = Block(i, body, terminator)
        if any(x.opcode == "wgmma" for x in body):
            block.collective = 128
        elif any(x.opcode in COLLECTIVE or is_warp_sync(x) for x in [*body, *([terminator] if terminator else [])]):
            block.collective = 32
        block.successors = [number[t] for t in _targets(kernel, terminator, end) if t in number]
        blocks.append(block)
    return blocks


def _targets(kernel: Kernel, terminator: Instr | None, following: int) -> list[int]:
    if terminator is None:
        return [following]
    if terminator.opcode == "bra":
        target = terminator.operands[0]
        assert isinstance(target, Sym)
        taken = kernel.labels[target.name]
        return [taken, following] if terminator.pred else [taken]
    if terminator.opcode == "brx":
        table = terminator.operands[1]
        assert isinstance(table, Sym)
        return [kernel.labels[name] for name in kernel.branch_targets[table.name]]
    if terminator.opcode in ("ret", "exit", "trap"):
        return [following] if terminator.pred else []
    return [following]


def _mark_ahead(blocks: list[Block]) -> None:
    """Forward reachability and loops; an edge to a block that a depth-first walk has not left yet closes a loop."""
    back: list[tuple[int, int]] = []
    state = [0] * len(blocks)  # 0 new, 1 open, 2 done
    stack: list[tuple[int, int]] = [(0, 0)] if blocks else []
    state[0] = 1
    while stack:
        b, edge = stack.pop()
        block = blocks[b]
        if edge < len(block.successors):
            stack.append((b, edge + 1))
            child = block.successors[edge]
            if state[child] == 0:
                state[child] = 1
                stack.append((child, 0))
            elif state[child] == 1:
                back.append((b, child))
            continue
        state[b] = 2
        block.ahead = 1 << b
        for child in block.successors:
            if state[child] == 2:
                block.ahead |= blocks[child].ahead
    sources: list[list[int]] = [[] for _ in blocks]
    for block in blocks:
        for child in block.successors:
            sources[child].append(block.index)
    for latch, head in back:
        body, todo = 1 << head, [latch]
        while todo:
            b = todo.pop()
            if not body >> b & 1:
                body |= 1 << b
                todo += sources[b]
        blocks[head].loop |= body & ~(1 << head)


def _lay_out(variables: list[Variable], guard: int) -> tuple[dict[str, int], list[tuple[int, int]], int]:
    offsets, extents, top = {}, [], 0
    for variable in variables:
        top = -(-top // variable.align) * variable.align
        offsets[variable.name] = top
        extents.append((top, variable.size))
        top += variable.size + guard
    return offsets, extents, top


def decode(kernel: Kernel, module_variables: dict[str, Variable]) -> Program:
    """Blocks and the layout of shared, local and parameter space.

    Static shared variables get guard bytes behind them: PTX promises nothing about their neighbours.
    """
    if not kernel.instrs:
        raise PtxError(f"kernel {kernel.name} has no instructions")
    blocks = _blocks(kernel)
    _mark_ahead(blocks)
    everything = {**module_variables, **kernel.variables}
    used = {op.name for i in kernel.instrs for op in _symbols(i)}
    shared_vars = [v for v in everything.values() if v.space == "shared" and v.name in used]
    shared, extents, static = _lay_out([v for v in shared_vars if v.size], 64)
    local, _, local_size = _lay_out([v for v in kernel.variables.values() if v.space in ("local", "param")], 16)
    params, _, param_size = _lay_out(kernel.params, 0)
    sizes = {p.name: p.size for p in kernel.params}
    return Program(
        kernel=kernel,
        blocks=blocks,
        shared=shared,
        shared_static=static,
        shared_extents=extents,
        dynamic_shared=[v.name for v in shared_vars if not v.size],
        local=local,
        local_size=-(-local_size // 16) * 16,
        params={name: (offset, sizes[name]) for name, offset in params.items()},
        param_size=param_size,
        granule=min(_shared_width(i) for i in kernel.instrs),
        agents=any(i.opcode in ("wgmma", "mbarrier") or "bulk" in i.mods for i in kernel.instrs),
        wgmma_registers=wgmma_registers(kernel),
    )


def _symbols(instr: Instr) -> list[Sym]:
    found: list[Sym] = []

    def walk(operand: object) -> None:
        if isinstance(operand, Sym):
            found.append(operand)
        for attribute in ("base", "first", "second"):
            if hasattr(operand, attribute):
                walk(getattr(operand, attribute))
        for item in getattr(operand, "items", ()):
            walk(item)

    for operand in instr.operands:
        walk(operand)
    return found


def _shared_width(instr: Instr) -> int:
    """Bytes of the narrowest piece in which `instr` may touch shared memory; 16 if it does not."""
    if instr.opcode in ("ld", "st", "atom", "red"):
        generic = not any(m.split("::")[0] in ("global", "const", "local", "param") for m in instr.mods)
        if generic or any(m.startswith("shared") for m in instr.mods):
            count = next((int(m[1]) for m in instr.mods if m in ("v2", "v4")), 1)
            return min(16, TYPE_BYTES[instr.mods[-1]] * count)
    if instr.opcode == "cp" and instr.mods[0] == "async" and len(instr.operands) > 2:
        size = instr.operands[2]
        return min(16, int(getattr(size, "value", 4)))
    return 16
