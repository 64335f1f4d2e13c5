"""The instruction set: importing this package fills the opcode registry."""

from . import convert, floating, integer, loads, moves, tensor, warp
from .core import OPS, compile_instr

__all__ = ["OPS", "compile_instr", "convert", "floating", "integer", "loads", "moves", "tensor", "warp"]
