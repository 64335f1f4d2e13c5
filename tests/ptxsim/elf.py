"""Rebinding a compiled library from NVIDIA's CUDA runtime to the simulator's.

In a process with torch, `libcudart.so.13` is already NVIDIA's. A copy of the library under test gets that name
replaced, in its list of needed libraries and in the version its symbols ask for, by one of the same length,
`libptxsim.so.13`. Versions then keep the two runtimes apart, whatever was loaded first or globally. Nothing else in
the file changes.
"""

from __future__ import annotations

import struct

REAL, SIMULATED = b"libcudart.so.13", b"libptxsim.so.13"
_SHT_VERNEED = 0x6FFFFFFE


def _hash(name: bytes) -> int:
    """The System V ELF symbol hash."""
    h = 0
    for byte in name:
        h = (h << 4) + byte
        high = h & 0xF0000000
        h = (h ^ high >> 24) & ~high & 0xFFFFFFFF
    return h


def rebind(image: bytes) -> bytes:
    """A copy of a 64-bit little-endian ELF library that needs `libptxsim.so.13` in place of `libcudart.so.13`."""
    if image[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    if REAL + b"\0" not in image:
        raise ValueError(f"the library does not need {REAL.decode()}: build it with `-cudart shared`")
    data = bytearray(image.replace(REAL + b"\0", SIMULATED + b"\0"))
    (table,), (entry, count) = struct.unpack_from("<Q", data, 0x28), struct.unpack_from("<HH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, table + i * entry) for i in range(count)]
    for _, kind, _, _, offset, _, link, needed, _, _ in sections:
        if kind != _SHT_VERNEED:
            continue
        strings = sections[link][4]
        for _ in range(needed):
            _, versions, _, first, following = struct.unpack_from("<HHIII", data, offset)
            aux = offset + first
            for _ in range(versions):
                name = strings + struct.unpack_from("<I", data, aux + 8)[0]
                if data[name : name + len(SIMULATED) + 1] == SIMULATED + b"\0":
                    struct.pack_into("<I", data, aux, _hash(SIMULATED))
                aux += struct.unpack_from("<I", data, aux + 12)[0]
            offset += following
    return bytes(data)
