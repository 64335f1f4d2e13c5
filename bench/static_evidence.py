"""What the compiled kernels show without a GPU: the compiler's resource report and the machine code itself.

    python -m bench.static_evidence                                # every instance, sm_90a
    python -m bench.static_evidence --arch 80 --kernels 'mvue_*'
    python -m bench.static_evidence --arch 90a --arch 80 --markdown bench/results/static_evidence.md

Per kernel: registers, spills, shared memory, the occupancy they allow, and the size of its main loop: of a sparse
product the innermost loop with sparse tensor-core instructions (how many, and their share), else the loop with the
longest way through it, or an earlier one with at least half of that (rare ways are laid out last). "fewest" counts the
instructions on the shortest way through that loop past all its loads and stores of 8 or 16 bytes, which is what an
iteration takes that meets no rare case (an inner loop counts once); the columns after it say on which pipe they run.

A kernel whose wgmma the compiler serialises or waits for is an error.

Needs nvcc and nvdisasm (wheel nvidia-cuda-nvdisasm where the toolkit has none).
"""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import click
from rich.console import Console
from rich.table import Table

from cutlass_ops import build_kernels


class Processor(NamedTuple):
    """Limits of one SM (CUDA C++ Programming Guide, compute capabilities)."""

    threads: int
    blocks: int
    shared_bytes: int
    registers: int = 65536


PROCESSORS = {
    "80": Processor(2048, 32, 164 << 10),
    "86": Processor(1536, 16, 100 << 10),
    "89": Processor(1536, 24, 100 << 10),
    "90": Processor(2048, 32, 228 << 10),
}
RESERVED_SHARED = 1 << 10  # per block, by the system, from sm_80 on


class Resources(NamedTuple):
    """What ptxas says of one kernel."""

    kernel: str
    registers: int
    spilled_bytes: int
    shared_bytes: int


class Instruction(NamedTuple):
    """One machine instruction. target: where it may jump to, an address."""

    address: int
    text: str  # without predicate and operands: the opcode with its modifiers
    predicated: bool
    target: int | None = None


class Loop(NamedTuple):
    """The instructions between the target of a backward branch and that branch."""

    instructions: list[Instruction]
    fewest: list[Instruction]  # those on the shortest way through


class Pipeline(NamedTuple):
    """Of a sparse product: its dynamic shared memory, and the stages of the dense operand in it."""

    shared_bytes: int
    stages: int


class Evidence(NamedTuple):
    """One kernel."""

    instance: str
    kernel: str
    resources: Resources
    threads: int
    pipeline: Pipeline | None
    blocks: int  # per SM, by registers, shared memory and threads
    loop: Loop | None


# Where an opcode runs, first match first. Lanes per SM and cycle on sm_80 and sm_90: FMA 64 and 128, integer
# multiply-adds 64 (wide ones fewer), ALU 64, XU 16 (CUDA C++ Programming Guide, arithmetic throughput).
PIPES = {
    "wide": r"IMAD\.(WIDE|HI)",
    "IMAD": r"IMAD|IDP",
    "FMA": r"FFMA|FMUL|FADD|FSWZ|H(FMA|MUL|ADD)2",
    "XU": r"MUFU|F2I\b|F2I\.|I2F\b|I2F\.|F2F|POPC|FLO|BREV|[DI]?2?D(FMA|MUL|ADD|SETP)|F2D",
    "memory": r"LD|ST|RED|ATOM|SHFL|CCTL|U?TMA|LDGSTS|SYNCS|MEMBAR|FENCE",
    "tensor": r"[HIQ]G?MMA",
    "uniform": r"U[A-Z]|R2UR|S2UR",
    "control": r"BRA|BRX|BSSY|BSYNC|CALL|RET|EXIT|WARPSYNC|YIELD|NOP|BAR|DEPBAR|BREAK|NANOSLEEP|ELECT|WARPGROUP",
    "ALU": r"",
}
# What ptxas prints where wgmma or setmaxnreg do not run as they are written: serialised, waited for, or ignored.
ADVICE = re.compile(r"\(C75\d\d\) .*")
WIDE_ACCESS = re.compile(r"(LDG|STG|LDGSTS)\b.*\.(64|128)\b")
SPARSE_PRODUCT = re.compile(r"(HMMA|HGMMA)\.SP")


def pipe_of(opcode: str) -> str:
    """The pipe of PIPES that an opcode runs on."""
    return next(pipe for pipe, pattern in PIPES.items() if re.match(pattern, opcode))


def find_disassembler(toolkit: build_kernels.Toolkit) -> Path:
    """nvdisasm of the toolkit, on the PATH, or of the wheel."""
    candidates = [toolkit.home / "bin" / "nvdisasm"]
    if found := shutil.which("nvdisasm"):
        candidates.append(Path(found))
    candidates += [Path(entry) / "nvidia" / "cu13" / "bin" / "nvdisasm" for entry in sys.path if entry]
    for path in candidates:
        if path.exists():
            return path
    raise click.ClickException("no nvdisasm found: pip install nvidia-cuda-nvdisasm")


def examine(source: Path, arch: str, flags: Sequence[str] = ()) -> list[Evidence]:
    """Compile one instance for one architecture and look at its kernels. flags: for nvcc, beside the build's."""
    toolkit = build_kernels.find_toolkit()
    if toolkit is None:
        raise click.ClickException("no CUDA toolkit found: set CUDA_HOME")
    disassembler = find_disassembler(toolkit)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [toolkit.nvcc, *build_kernels.COMPILE_FLAGS, *flags, "-I", build_kernels.INCLUDE, "-Xptxas", "-v"]
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "-cubin", "-keep", "-keep-dir", folder]
        report = subprocess.run([*command, source, "-o", cubin], capture_output=True, text=True, check=False)  # type: ignore[arg-type]
        if report.returncode != 0:
            raise click.ClickException(f"{source.name}: {report.stderr.strip()[-2000:]}")
        if advice := ADVICE.search(report.stderr):
            raise click.ClickException(f"{source.name}: {advice[0]}")
        listing = subprocess.run([disassembler, "-c", cubin], capture_output=True, text=True, check=True).stdout
        ptx = "".join(path.read_text() for path in Path(folder).glob("*.ptx"))
    threads, kernels = block_sizes(ptx), parse_listing(listing)
    evidence = []
    for resources in parse_report(report.stderr):
        kernel = resources.kernel
        pipeline = find_pipeline(ptx) if "sparse_gemm_kernel" in kernel else None
        dynamic = 0 if pipeline is None else pipeline.shared_bytes
        blocks = resident_blocks(resources, threads[kernel], arch, dynamic)
        loop = main_loop(kernels[kernel])
        evidence.append(Evidence(source.stem, readable(kernel), resources, threads[kernel], pipeline, blocks, loop))
    return evidence


def find_pipeline(ptx: str) -> Pipeline | None:
    """What SDGP_LAUNCH_FACTS (cutlass_ops/include/sdgp/product.cuh) left in the PTX: two integers, as bytes."""
    found = re.search(r"_facts\[8\] = \{([^}]*)\}", ptx)
    if found is None:
        return None
    data = bytes(int(value) for value in found[1].split(",")).ljust(8, b"\0")  # zeros at the end are left out
    return Pipeline(int.from_bytes(data[:4], "little"), int.from_bytes(data[4:], "little"))


def parse_report(output: str) -> list[Resources]:
    """The kernels in what ``ptxas -v`` printed."""
    kernels = []
    for block in output.split("Compiling entry function")[1:]:
        name, registers = re.search(r"'(\w+)'", block), re.search(r"Used (\d+) registers", block)
        assert name is not None
        assert registers is not None
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", block)))
        shared = re.search(r"(\d+) bytes smem", block)
        kernels.append(Resources(name[1], int(registers[1]), spills, int(shared[1]) if shared else 0))
    return kernels


def block_sizes(ptx: str) -> dict[str, int]:
    """Threads per block, from the launch bounds of each kernel; 1024 where it has none."""
    sizes = {}
    for block in ptx.split(".entry ")[1:]:
        name, body = re.split(r"[\s(]", block, maxsplit=1)
        bounds = re.search(r"\.maxntid (\d+)(?:, (\d+))?(?:, (\d+))?", body.split("{", 1)[0])
        sizes[name] = 1024 if bounds is None else int(bounds[1]) * int(bounds[2] or 1) * int(bounds[3] or 1)
    return sizes


def resident_blocks(resources: Resources, threads: int, arch: str, dynamic_bytes: int = 0) -> int:
    """Blocks that fit on one SM at a time."""
    sm = PROCESSORS[arch.rstrip("af")]
    warps = -(-threads // 32)
    registers_per_warp = -(-resources.registers * 32 // 256) * 256
    # Each of the four partitions holds whole warps.
    by_registers = sm.registers // 4 // registers_per_warp * 4 // warps
    by_shared = sm.shared_bytes // (-(-(resources.shared_bytes + dynamic_bytes) // 128) * 128 + RESERVED_SHARED)
    return min(by_registers, by_shared, sm.threads // (warps * 32), sm.blocks)


def parse_listing(listing: str) -> dict[str, list[Instruction]]:
    """The instructions of each kernel in what ``nvdisasm -c`` printed."""
    kernels: dict[str, list[Instruction]] = {}
    for section in re.split(r"^\s*\.section\s+\.text\.", listing, flags=re.MULTILINE)[1:]:
        labels: dict[str, int] = {}
        waiting: list[str] = []  # labels of the next instruction
        found: list[tuple[int, str, str]] = []
        for line in section.splitlines():
            if label := re.match(r"(\.L_\w+|\$\S+):", line):
                waiting.append(label[1])
            elif code := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
                address = int(code[1], 16)
                labels |= dict.fromkeys(waiting, address)
                waiting = []
                found.append((address, *_split_predicate(code[2])))
        instructions = []
        for address, predicate, text in found:
            jump = re.search(r"`\((\.L_\w+)\)", text) if re.match(r"(BRA|BRX)\b", text) else None
            opcode = text.split(" ", 1)[0]
            instructions.append(Instruction(address, opcode, bool(predicate), labels.get(jump[1]) if jump else None))
        kernels[section.split(",", 1)[0]] = instructions
    return kernels


def _split_predicate(text: str) -> tuple[str, str]:
    match = re.match(r"(@!?U?P\w+)?\s*(.*)", text)
    assert match is not None
    # A branch may carry its condition as an operand as well: BRA P0, `(.L_x_1).
    conditional = match[1] or ("P" if re.match(r"BRA\S* !?U?P\d", match[2]) else "")
    return conditional, match[2]


def main_loop(instructions: Sequence[Instruction]) -> Loop | None:
    """The loop that matters; None for a kernel without one."""
    place = {instruction.address: i for i, instruction in enumerate(instructions)}
    spans = {
        (place[instruction.target], i)
        for i, instruction in enumerate(instructions)
        if instruction.target is not None and instruction.target < instruction.address
    }
    loops = [Loop(list(instructions[a : b + 1]), shortest_way(instructions[a : b + 1])) for a, b in sorted(spans)]
    sparse = [loop for loop in loops if any(SPARSE_PRODUCT.match(i.text) for i in loop.instructions)]
    if sparse:
        return min(sparse, key=lambda loop: len(loop.instructions))
    longest = max((len(loop.fewest) for loop in loops), default=0)
    return next((loop for loop in loops if 2 * len(loop.fewest) >= longest), None)


def shortest_way(loop: Sequence[Instruction]) -> list[Instruction]:
    """The instructions on the shortest way from the first of a loop to its last, past all wide loads and stores that
    lie on one way; empty where there is none.
    """
    place = {instruction.address: i for i, instruction in enumerate(loop)}
    following = []
    for i, instruction in enumerate(loop):
        stops = re.match(r"(BRA|BRX|EXIT|RET)\b", instruction.text) is not None and not instruction.predicated
        after = [] if stops or i + 1 == len(loop) else [i + 1]
        if instruction.target in place and i + 1 < len(loop):
            after.append(place[instruction.target])
        following.append(after)
    way = [0]
    for i in [i for i, instruction in enumerate(loop) if WIDE_ACCESS.match(instruction.text)] + [len(loop) - 1]:
        if i <= way[-1]:
            continue
        part = _breadth_first(following, way[-1], i)
        if part and (i + 1 == len(loop) or _breadth_first(following, i, len(loop) - 1)):
            way += part
    return [loop[i] for i in way] if way[-1] + 1 == len(loop) else []


def _breadth_first(following: Sequence[Sequence[int]], start: int, end: int) -> list[int]:
    """The shortest way from `start`, which is left out, to `end`; empty where there is none."""
    origin, queue = {start: start}, deque([start])
    while queue and end not in origin:
        i = queue.popleft()
        for j in following[i]:
            if j not in origin:
                origin[j] = i
                queue.append(j)
    way: list[int] = []
    while end in origin and end != start:
        way.append(end)
        end = origin[end]
    return way[::-1]


def readable(symbol: str) -> str:
    """A mangled kernel name as the innermost name and the 16-bit type."""
    name, rest = symbol, symbol.removeprefix("_ZN").removeprefix("_Z")
    while length := re.match(r"\d+", rest):
        end = length.end() + int(length[0])
        name, rest = rest[length.end() : end], rest[end:]
    types = {"__nv_bfloat16": "bf16", "bfloat16_t": "bf16", "__half": "f16", "half_t": "f16"}
    element = next((short for long, short in types.items() if long in symbol), "")
    return f"{name} {element}".strip()


COLUMNS = (
    "instance", "kernel", "registers", "spilled bytes", "shared bytes", "stages", "threads", "blocks / SM",
    "warps / SM", "main loop", "sparse MMA", "fewest", *PIPES,
)  # fmt: skip


def cells(evidence: Evidence) -> list[str]:
    """One row of the table, as in COLUMNS."""
    resources, loop = evidence.resources, evidence.loop
    shared = resources.shared_bytes + (evidence.pipeline.shared_bytes if evidence.pipeline else 0)
    stages = evidence.pipeline.stages if evidence.pipeline else ""
    warps = evidence.blocks * (-(-evidence.threads // 32))
    numbers = (
        resources.registers, resources.spilled_bytes, shared, stages, evidence.threads, evidence.blocks, warps,
    )  # fmt: skip
    row = [evidence.instance, evidence.kernel, *map(str, numbers)]
    if loop is None:
        return row + [""] * (3 + len(PIPES))
    products = sum(bool(SPARSE_PRODUCT.match(i.text)) for i in loop.instructions)
    share = f"{products} = {products / len(loop.instructions):.0%}" if products else ""
    mix = Counter(pipe_of(instruction.text) for instruction in loop.fewest)
    return [*row, str(len(loop.instructions)), share, str(len(loop.fewest)), *(str(mix[pipe]) for pipe in PIPES)]


def gather(arch: str, pattern: str, jobs: int, flags: Sequence[str] = ()) -> list[Evidence]:
    """The evidence of all instances whose name matches, `jobs` compilers at a time."""
    sources = [s for s in sorted(build_kernels.INSTANCES.glob("*.cu")) if fnmatch.fnmatch(s.stem, pattern)]
    sources = [source for source in sources if build_kernels.archs_of(source, (arch,))]
    with ThreadPoolExecutor(jobs) as pool:
        return [kernel for found in pool.map(lambda s: examine(s, arch, flags), sources) for kernel in found]


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """The same as a Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (COLUMNS, ["---"] * len(COLUMNS), *rows))


def print_table(title: str, rows: Iterable[Sequence[str]]) -> None:
    """To the console."""
    table = Table(title=title)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("instance", "kernel") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=240).print(table)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--arch", "archs", multiple=True, default=("90a",), show_default=True, help="Architecture; repeatable.")
@click.option("--kernels", "pattern", default="*", show_default=True, help="Instances to look at, a glob.")
@click.option("--jobs", default=len(os.sched_getaffinity(0)), show_default=True, help="Compilers at a time.")
@click.option("--flag", "flags", multiple=True, help="Passed on to nvcc; repeatable.")
@click.option("--markdown", "path", type=click.Path(dir_okay=False, path_type=Path), help="Where a table goes.")
def main(archs: Sequence[str], pattern: str, jobs: int, flags: Sequence[str], path: Path | None) -> None:
    """Registers, spills, occupancy and instruction mix of the compiled kernels."""
    toolkit = build_kernels.find_toolkit()
    compiler = "" if toolkit is None else toolkit.version.strip().splitlines()[-1]
    parts = ["# Static evidence of the kernels", __doc__.split("\n\n")[2].strip(), f"Compiler: {compiler}."]
    for arch in archs:
        rows = [cells(kernel) for kernel in gather(arch, pattern, jobs, flags)]
        print_table(f"sm_{arch}", rows)
        parts += [f"## sm_{arch}", markdown(rows)]
    if path is not None:
        path.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
