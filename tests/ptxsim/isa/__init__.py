"""The instruction set: importing this package fills the opcode registry."""

from . import convert, floating, hopper, integer, loads, moves, tensor, warp, wgmma
from .core import OPS, compile_instr

__all__ = [
    "OPS",
    "compile_instr",
    "convert",
    "floating",
    "hopper",
    "integer",
    "loads",
    "moves",
    "tensor",
    "warp",
    "wgmma",
]
