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
    assert static_evidence.block_sizes(ptx) == {"one": 128, "two": 1024}


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


def test_the_way_through_a_loop_takes_its_wide_accesses_with_it() -> None:
    """Two branches: over a store of 8 bytes, which counts, and over one of 4, which does not."""
    lines = [
        "LDG.E.128 R4, [R2.64]", "@P0 BRA `(.L_x_2)", "IADD3 R4, R4, R5, R6", "STG.E.64 [R2.64], R4", "L2",
        "@P1 BRA `(.L_x_3)", "STG.E [R2.64], R4", "L3", "@P2 BRA `(.L_x_1)", "L4", "FADD R1, R1, R1",
        "@P3 BRA `(.L_x_4)", "EXIT",
    ]  # fmt: skip
    listing = '\t.section\t.text.kernel,"ax"\n.L_x_1:\n'
    for i, line in enumerate(lines):
        listing += (
            f".L_x_{line[1:]}:\n" if line[0] == "L" and len(line) == 2 else f"        /*{16 * i:04x}*/  {line} ;\n"
        )
    loop = static_evidence.main_loop(static_evidence.parse_listing(listing)["kernel"])
    assert loop is not None
    assert len(loop.instructions) == 7
    assert [i.text.split(".")[0] for i in loop.fewest] == ["LDG", "BRA", "IADD3", "STG", "BRA", "BRA"]


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "blocks"),
    [(32, 0, 256, 8), (126, 12288, 128, 4), (168, 0, 384, 1), (32, 100 << 10, 128, 2), (16, 0, 32, 32)],
)
def test_occupancy_by_hand(registers: int, shared: int, threads: int, blocks: int) -> None:
    """On sm_90: 64 warps, 65536 registers in units of 256 per warp, 228 KiB of which each block takes 1 KiB more."""
    assert static_evidence.resident_blocks(Resources("kernel", registers, 0, shared), threads, "90a") == blocks


def test_names() -> None:
    symbol = "_ZN4sdgp21prune_compress_kernelI13__nv_bfloat16NS_4MvueIS1_Li2ELi4EEELi4ELb0EEEv17SdgpPruneCompress"
    assert static_evidence.readable(symbol) == "prune_compress_kernel bf16"


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
