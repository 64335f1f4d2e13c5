"""`bench/static_evidence.py` on text of the shape that the tools print, and on one kernel."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from bench import report, static_evidence
from bench.static_evidence import Resources
from cutlass_ops import build_kernels

LISTING = """
	.section	.text.kernel,"ax",@progbits
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
        /*0030*/                   IMAD.WIDE.U32 R4, R4, R5, RZ ;
        /*0040*/                   LOP3.LUT R4, R4, R5, RZ, 0x3c, !PT ;
.L_x_2:
        /*0050*/                   FMUL R4, R4, R5 ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
.L_x_3:
        /*0070*/                   HGMMA.SP.64x128x32.F32.BF16 R24, gdesc[UR8].tnspB, R24, R89, 0x0 ;
        /*0080*/                   BRA P3, `(.L_x_3) ;
        /*0090*/                   EXIT ;
.L_x_4:
        /*00a0*/                   BRA `(.L_x_4);

	.section	.text.other,"ax",@progbits
        /*0000*/                   EXIT ;
"""


def test_a_compiler_report_is_read() -> None:
    report = """ptxas info    : Compiling entry function 'one' for 'sm_90a'
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 4096 bytes smem
ptxas info    : Compiling entry function 'two' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 17 registers, used 0 barriers
"""
    assert static_evidence.parse_report(report) == [("one", 96, 16, 4096), ("two", 17, 0, 0)]


def test_block_sizes_are_launch_bounds() -> None:
    ptx = ".visible .entry one(\n.param .u64 p\n)\n.maxntid 32, 4\n{\nret;\n}\n.visible .entry two()\n{\n}\n"
    ptx += ".visible .entry three()\n.maxntid 8, 4, 2\n{\n}\n"
    assert static_evidence.block_sizes(ptx) == {"one": 128, "two": 1024, "three": 64}


def test_loops_and_pipes() -> None:
    kernels = static_evidence.parse_listing(LISTING)
    assert [len(code) for code in kernels.values()] == [11, 1]
    product = static_evidence.main_loop(kernels["kernel"])
    assert product is not None
    assert [instruction.text.split(".")[0] for instruction in product.instructions] == ["HGMMA", "BRA"]
    plain = static_evidence.main_loop(kernels["kernel"][:7])
    assert plain is not None
    assert len(plain.instructions) == 6
    assert [static_evidence.pipe_of(i.text) for i in plain.fewest] == ["memory", "control", "FMA", "control"]
    assert static_evidence.pipe_of("IMAD.WIDE.U32") == "wide"
    assert static_evidence.pipe_of("LOP3.LUT") == "ALU"


def instructions(lines: list[str]) -> list[static_evidence.Instruction]:
    """A kernel of these instructions and, where a line is L and a digit, labels."""
    listing = '\t.section\t.text.kernel,"ax"\n'
    for i, line in enumerate(lines):
        is_label = line[0] == "L" and len(line) == 2
        listing += f".L_x_{line[1:]}:\n" if is_label else f"        /*{16 * i:04x}*/  {line} ;\n"
    return static_evidence.parse_listing(listing)["kernel"]


def opcodes(loop: static_evidence.Loop | None) -> list[str]:
    return [] if loop is None else [instruction.text for instruction in loop.fewest]


def test_the_main_loop_is_the_innermost_with_products_or_the_first_that_is_not_short() -> None:
    """What stands behind the exit of every kernel, a jump to itself, is no loop."""
    end = ["EXIT", "L9", "BRA `(.L_x_9)"]
    assert static_evidence.main_loop(instructions(["FADD R1, R1, R1", *end])) is None
    nested = ["L1", "IADD3 R1, R1, R1", "L2", "HMMA.SP.16816.F32 R1, R1, R1", "@P0 BRA `(.L_x_2)", "@P1 BRA `(.L_x_1)"]
    assert opcodes(static_evidence.main_loop(instructions(nested + end))) == ["HMMA.SP.16816.F32", "BRA"]
    short = ["L1", "FADD R1, R1, R1", "@P0 BRA `(.L_x_1)"]
    half = ["L2", *["FMUL R1, R1, R1"] * 2, "@P0 BRA `(.L_x_2)"]
    longest = ["L3", *["IADD3 R1, R1, R1"] * 3, "@P1 BRA `(.L_x_4)", *["LOP3.LUT R1, R1, R1"] * 9, "L4"]
    kernel = instructions([*short, *half, *longest, "@P0 BRA `(.L_x_3)", *end])
    assert opcodes(static_evidence.main_loop(kernel)) == ["FMUL", "FMUL", "BRA"]


def test_nothing_follows_a_jump_that_is_always_taken() -> None:
    lines = [
        "L1", "FADD R1, R1, R1", "BRA `(.L_x_3)", "L2", "FMUL R1, R1, R1", "BRA `(.L_x_4)", "L3", "MUFU.EX2 R1, R1",
        "BRA `(.L_x_2)", "L4", "@P0 BRA `(.L_x_1)",
    ]  # fmt: skip
    way = static_evidence.shortest_way(instructions(lines))
    assert [i.text for i in way] == ["FADD", "BRA", "MUFU.EX2", "BRA", "FMUL", "BRA", "BRA"]


def test_the_way_through_a_loop_takes_its_wide_accesses_with_it() -> None:
    """Two branches: over a store of 8 bytes, which counts, and over one of 4, which does not."""
    lines = [
        "LDG.E.128 R4, [R2.64]", "BRA P0, `(.L_x_2)", "IADD3 R4, R4, R5, R6", "STG.E.64 [R2.64], R4", "L2",
        "@P1 BRA `(.L_x_3)", "STG.E [R2.64], R4", "L3", "@P2 BRA `(.L_x_1)", "L4", "FADD R1, R1, R1",
        "@P3 BRA `(.L_x_4)", "EXIT",
    ]  # fmt: skip
    loop = static_evidence.main_loop(instructions(["L1", *lines]))
    assert loop is not None
    assert len(loop.instructions) == 7
    assert [i.text.split(".")[0] for i in loop.fewest] == ["LDG", "BRA", "IADD3", "STG", "BRA", "BRA"]


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "blocks"),
    [
        (32, 0, 256, 8),
        (126, 12288, 128, 4),
        (168, 0, 384, 1),
        (32, 100 << 10, 128, 2),
        (16, 0, 32, 32),
        (33, 0, 256, 6),  # 1280 registers per warp: 12 warps in each quarter of the SM, 48 in all
        (40, 0, 96, 16),  # the same, where all 65536 registers would be enough for 51
        (64, 0, 48, 16),  # two warps, the second one half empty
        (16, 0, 1024, 2),  # 2048 threads
    ],
)
def test_occupancy_by_hand(registers: int, shared: int, threads: int, blocks: int) -> None:
    """On sm_90: 64 warps, 65536 registers in units of 256 per warp, 228 KiB of which each block takes 1 KiB more."""
    assert static_evidence.resident_blocks(Resources("kernel", registers, 0, shared), threads, "90a") == blocks


def test_occupancy_counts_dynamic_memory_and_depends_on_the_gpu() -> None:
    small = Resources("kernel", 16, 0, 1 << 10)
    assert static_evidence.resident_blocks(small, 128, "90a", 112 << 10) == 2  # 1 + 112 + 1 KiB each, of 228
    assert static_evidence.resident_blocks(small, 128, "80", 112 << 10) == 1  # of 164
    assert static_evidence.resident_blocks(small, 1024, "86") == 1  # 1536 threads


def test_a_row_of_the_table() -> None:
    """Of the main loop: its length, the sparse products' share of it, and the pipes of its shortest way."""
    texts = ("HGMMA.SP.64x128x32.F32.BF16", "HMMA.SP.16816.F32", "MUFU.EX2", "BRA")
    loop = [static_evidence.Instruction(16 * i, text, False) for i, text in enumerate(texts)]
    evidence = static_evidence.Evidence(
        "instance", "kernel", Resources("symbol", 90, 8, 1024), 384, static_evidence.Pipeline(2048, 4), 2,
        static_evidence.Loop(loop, [loop[0], loop[1], loop[3]]),
    )  # fmt: skip
    row = dict(zip(static_evidence.COLUMNS, static_evidence.cells(evidence), strict=True))
    assert {column: cell for column, cell in row.items() if cell != "0"} == {
        "instance": "instance", "kernel": "kernel", "registers": "90", "spilled bytes": "8", "shared bytes": "3072",
        "stages": "4", "threads": "384", "blocks / SM": "2", "warps / SM": "24", "main loop": "4",
        "sparse MMA": "2 = 50%", "fewest": "3", "tensor": "2", "control": "1",
    }  # fmt: skip


def test_names() -> None:
    symbol = "_ZN4sdgp21prune_compress_kernelI13__nv_bfloat16NS_4MvueIS1_Li2ELi4EEELi4ELb0EEEv17SdgpPruneCompress"
    assert static_evidence.readable(symbol) == "prune_compress_kernel bf16"
    assert static_evidence.readable("_Z3sumI6__halfEvPT_") == "sum f16"


def test_an_instance() -> None:
    try:
        found = static_evidence.examine(build_kernels.INSTANCES / "bias_sum.cu", "80")
    except click.ClickException as problem:
        pytest.skip(problem.message)
    assert sorted(kernel.kernel for kernel in found) == [
        "sum_bias_partials", "sum_bias_partials bf16", "sum_bias_partials f16",
    ]  # fmt: skip
    assert all((kernel.threads, kernel.resources.spilled_bytes) == (1024, 0) for kernel in found)
    assert all(kernel.loop is not None for kernel in found)


def test_a_wgmma_that_the_compiler_waits_for_is_an_error(tmp_path: Path) -> None:
    """Here because of a call between two of them."""
    toolkit = build_kernels.find_toolkit()
    if toolkit is None:
        pytest.skip("no CUDA toolkit")
    try:
        static_evidence.find_disassembler(toolkit)
    except click.ClickException as problem:
        pytest.skip(problem.message)
    source = tmp_path / "interrupted.cu"
    source.write_text("""
        #include "sdgp/sm90_ptx.cuh"
        using namespace sdgp::sm90;
        __device__ __noinline__ float call(float x) { return 3 * x; }
        __global__ void __launch_bounds__(128) interrupted(float* out, uint64_t a, uint64_t b, uint32_t e) {
          float d[32];
          wgmma_fence();
          sparse_wgmma<__half, 64, Major::K, 0>(d, a, b, e, false);
          out[0] = call(out[0]);
          sparse_wgmma<__half, 64, Major::K, 0>(d, a, b, e, true);
          wgmma_commit_group();
          wgmma_wait_group<0>();
          for (int i = 0; i < 32; ++i) out[i * 128 + threadIdx.x] = d[i];
        }
    """)
    with pytest.raises(click.ClickException, match=r"^interrupted\.cu: \(C75\d\d\) .*_Z11interrupted\w*'$"):
        static_evidence.examine(source, "90a")


def test_launch_facts_are_read_from_the_ptx():
    ptx = ".const .align 4 .b8 sdgp_sm80_dgrad_bf16_128x64_facts[8] = {0, 16, 1, 0, 4};"
    assert static_evidence.find_pipeline(ptx) == static_evidence.Pipeline(69632, 4)
    assert static_evidence.find_pipeline("no such line") is None


@pytest.mark.parametrize("page", sorted(report.RESULTS.glob("static_evidence-*.md")), ids=lambda page: page.stem)
def test_no_kernel_spills(page: Path) -> None:
    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")]
    spilled = rows[0].index("spilled bytes")
    assert {row[spilled] for row in rows[2:]} == {"0"}
