"""What the simulator reports: one exception with the kind of fault, the kernel, the PTX line and the thread."""

from __future__ import annotations

KINDS = {
    "out-of-bounds": "an access outside every live allocation (or in the guard bytes around one)",
    "misaligned": "an address that is not a multiple of the access's size",
    "uninitialised-read": "a load of bytes that nothing has written",
    "shared-race": "two threads touch a shared-memory byte, one writing, with no barrier between",
    "global-race": "two CTAs touch a byte of global memory, one writing, with nothing that orders them",
    "async-race": "an access to what a cp.async or wgmma still owns: no wait for its group in between",
    "divergent-sync": "a shuffle, vote or match that lanes of its member mask never reach",
    "divergent-aligned": "an .aligned instruction that only a part of a warp executes",
    "illegal-metadata": "a 2:4 selector nibble whose two indices are not ascending",
    "deadlock": "threads wait for a barrier that cannot complete",
    "no-progress": "the instruction budget ran out (a spin loop that nothing ends)",
    "unknown-opcode": "an instruction that the simulator does not implement",
    "mbarrier": "an mbarrier not initialised, with too many arrivals, or waited for by a parity that fits two phases",
    "trap": "the kernel executed trap or failed a device-side assert",
    "launch": "a launch configuration or argument that the runtime must refuse",
}


class SimError(Exception):
    """A fault of a simulated kernel. `kind` is a key of KINDS; `line` counts from 1 in the module's PTX."""

    def __init__(
        self, kind: str, detail: str, *, kernel: str = "", line: int = 0, text: str = "", thread: str = ""
    ) -> None:
        assert kind in KINDS, kind
        self.kind, self.detail, self.kernel, self.line, self.text, self.thread = (
            kind,
            detail,
            kernel,
            line,
            text,
            thread,
        )
        where = f"{kernel}, PTX line {line} `{text}`" if line else kernel
        super().__init__(f"{kind}: {detail}\n  at {where}" + (f"\n  by {thread}" if thread else ""))
