"""A PTX simulator: runs compiled CUDA kernels on the CPU, through their own host code, and checks every access.

How a launch gets here, file by file:

    elf          a copy of the library under test needs `libptxsim.so.13` in place of NVIDIA's runtime
    shim/        that runtime: C that hands registrations, allocations and launches to Python
    runtime      takes them; finds the kernel's PTX in the fat binary
    ptx          parses it;  program  splits it into basic blocks and lays out its memories
    machine      runs the grid in waves of CTAs;  wave  their registers and compiled code
    scheduler    who runs next: divergence, reconvergence, spinning;  barriers
    isa/         what each instruction does, as numpy operations over all threads of the wave
    memory       global memory with byte shadows;  shared  shared memory with a race detector;  tma  tensor maps;
    global_races between thread blocks;  in_flight  the registers of wgmma
    faults       what is reported, by name, with kernel, PTX line and thread
    engine       the whole for tests, in torch tensors;  toolchain  finds and caches what nvcc compiles

Covered: what nvcc emits for integer, float, half and bfloat16 code; all state spaces; named barriers, shuffles,
votes, atomics; cp.async; ldmatrix, mma and mma.sp (f16, bf16, tf32, s8); on sm_90a mbarriers, TMA tiles and im2col,
wgmma and wgmma.sp of 16-bit operands, clusters. Anything else is an `unknown-opcode` fault that names it, when it is
executed.

Not seen: orders of completion other than "asynchronous copies are done when they are issued" (what a thread may rely on
is tracked, not replayed), the size of rounding errors of tensor cores and of approximate functions (both are exact to
one rounding here). Races between thread blocks on global memory are seen where asked for (`following_global_memory`).
"""
