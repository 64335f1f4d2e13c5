"""PTX text to instructions: a parser for what nvcc emits.

`parse(text)` returns a `Module` with its kernels and module-scope variables. Nothing here knows what an opcode means;
that is `isa`. Registers, shared variables and local variables declared in nested `{ }` scopes (inline assembly) are
renamed so that every name in a kernel is unique.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

TYPE_BYTES = {
    **{f"{kind}{bits}": bits // 8 for kind in "busf" for bits in (8, 16, 32, 64, 128)},
    "f16x2": 4,
    "bf16": 2,
    "bf16x2": 4,
    "tf32": 4,
    "pred": 1,
}


class PtxError(Exception):
    """The PTX text is malformed or uses something the simulator does not implement."""


@dataclass(frozen=True)
class Reg:
    name: str
    negated: bool = False


@dataclass(frozen=True)
class Imm:
    """A literal; floats carry their bit pattern in `value` and their width in `float_bits` (0 for integers)."""

    value: int
    float_bits: int = 0


@dataclass(frozen=True)
class Sym:
    name: str
    offset: int = 0


@dataclass(frozen=True)
class Vec:
    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Mem:
    base: Reg | Sym | Imm
    offset: int = 0
    coords: Vec | None = None


@dataclass(frozen=True)
class Pair:
    """`%r1|%p1`: a destination with a second, predicate destination."""

    first: Operand
    second: Operand


Operand = Reg | Imm | Sym | Vec | Mem | Pair


@dataclass(frozen=True)
class Instr:
    opcode: str
    mods: tuple[str, ...]
    operands: tuple[Operand, ...]
    pred: Reg | None
    line: int
    text: str


@dataclass(frozen=True)
class Variable:
    """A .shared, .local, .global, .const or .param variable; `size` 0 marks the dynamically sized shared array."""

    name: str
    space: str
    align: int
    size: int
    init: bytes | None = None


@dataclass
class Kernel:
    name: str
    params: list[Variable] = field(default_factory=list)
    regs: dict[str, str] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    instrs: list[Instr] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    branch_targets: dict[str, tuple[str, ...]] = field(default_factory=dict)
    max_threads: int | None = None


@dataclass
class Module:
    target: str = ""
    kernels: dict[str, Kernel] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)


_IDENT = r"[A-Za-z_$%][\w$.]*"
_REG_DECL = re.compile(r"(%?[\w$]+)<(\d+)>")
_VAR_DECL = re.compile(
    r"(?:\.(?:visible|extern|weak|common)\s+)*\.(shared|local|global|const|param)\s+(?:\.ptr\s+)?(?:\.align\s+(\d+)\s+)?"
    r"(?:\.ptr\s+)?(?:\.attribute\([^)]*\)\s*)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?"
    rf"({_IDENT})((?:\[\d*\])*)\s*(?:=\s*(.*))?$",
    re.S,
)
_LABEL = re.compile(rf"\s*({_IDENT})\s*:(?!:)")
_STRUCTURAL = re.compile(r"[;{}]")


def split_operands(text: str) -> list[str]:
    """Splits at commas outside (), [] and {}."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    tail = text[start:].strip()
    return [*parts, tail] if tail else parts


def parse_literal(text: str) -> Imm | None:
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return Imm(int(text[2:], 16), 32)
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return Imm(int(text[2:], 16), 64)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", text):
        return Imm(int(text.rstrip("U"), 0 if not re.fullmatch(r"-?0\d+U?", text) else 8))
    if re.fullmatch(r"-?\d*\.\d+(e[+-]?\d+)?", text):
        return Imm(struct.unpack("<Q", struct.pack("<d", float(text)))[0], 64)
    return None


class _Parser:
    def __init__(self, text: str, wanted: str | None) -> None:
        self.wanted = wanted
        self.symbols: set[str] = set()  # renamed labels and variables, as against registers
        self.text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group().count("\n"), text, flags=re.S)
        self.text = re.sub(r"//[^\n]*", "", self.text)
        self.pos = 0
        self.line = 1
        self.module = Module()

    def fail(self, message: str) -> PtxError:
        return PtxError(f"PTX line {self.line}: {message}")

    def advance(self, end: int) -> str:
        chunk = self.text[self.pos : end]
        self.line += chunk.count("\n")
        self.pos = end
        return chunk

    def skip_space(self) -> bool:
        match = re.compile(r"\s*").match(self.text, self.pos)
        self.advance(match.end() if match else self.pos)
        return self.pos < len(self.text)

    def parse(self) -> Module:
        while self.skip_space():
            rest = self.text[self.pos : self.pos + 16]
            if rest.startswith((".version", ".target", ".address_size", ".file", ".loc ", ".loc\t")):
                directive = self.advance(self._line_end()).strip()
                if directive.startswith(".target"):
                    self.module.target = directive.split()[1].rstrip(",")
            elif rest.startswith(".section"):
                self.advance(self._matching_brace(self.text.index("{", self.pos)) + 1)
            elif re.match(r"(\.(visible|weak|extern)\s+)*\.(entry|func)\b", self.text[self.pos : self.pos + 60]):
                self.function()
            else:
                self.variable_statement(self.module.variables, {})
        return self.module

    def _line_end(self) -> int:
        end = self.text.find("\n", self.pos)
        return len(self.text) if end < 0 else end

    def _matching_brace(self, start: int) -> int:
        depth = 0
        for match in re.compile(r"[{}]").finditer(self.text, start):
            depth += 1 if match.group() == "{" else -1
            if depth == 0:
                return match.start()
        raise self.fail("unbalanced braces")

    def variable_statement(self, into: dict[str, Variable], rename: dict[str, str]) -> None:
        end = self._statement_end()
        self.declare(self.advance(end).strip(), into, rename)
        self.pos += 1

    def _statement_end(self) -> int:
        depth = 0
        for match in _STRUCTURAL.finditer(self.text, self.pos):
            char = match.group()
            if char == ";" and depth == 0:
                return match.start()
            depth += {"{": 1, "}": -1, ";": 0}[char]
        raise self.fail("statement without ';'")

    def declare(self, text: str, into: dict[str, Variable], rename: dict[str, str]) -> None:
        match = _VAR_DECL.match(text)
        if not match:
            raise self.fail(f"cannot parse declaration {text[:80]!r}")
        space, align, dtype, name, dims, init = match.groups()
        element = TYPE_BYTES[dtype]
        sizes = [int(d) if d else 0 for d in re.findall(r"\[(\d*)\]", dims)]
        size = element
        for dim in sizes:
            size *= dim
        data = None
        if init is not None:
            values = [parse_literal(v.strip()) for v in init.strip().strip("{}").split(",")]
            if any(v is None for v in values):
                raise self.fail(f"initialiser of {name} is not a list of literals")
            data = b"".join((v.value & (1 << 8 * element) - 1).to_bytes(element, "little") for v in values if v)
        into[rename.get(name, name)] = Variable(rename.get(name, name), space, int(align or element), size, data)

    def function(self) -> None:
        end = min(i for i in (self.text.find("{", self.pos), self.text.find(";", self.pos)) if i >= 0)
        header = self.advance(end)
        if self.text[end] == ";":
            self.advance(end + 1)
            return
        match = re.search(rf"\.entry\s+({_IDENT})\s*(?:\((.*?)\))?", header, re.S)
        if match is None or self.wanted not in (None, match.group(1)):
            # Another kernel, or a device function that nvcc did not inline: who calls that fails at the call, by name.
            self.advance(self._matching_brace(end) + 1)
            return
        kernel = Kernel(match.group(1))
        for param in split_operands(match.group(2) or ""):
            declared: dict[str, Variable] = {}
            self.declare(param, declared, {})
            kernel.params.extend(declared.values())
        limit = re.search(r"\.(?:maxntid|reqntid)\s+([\d,\s]+)", header)
        if limit:
            kernel.max_threads = 1
            for dim in limit.group(1).split(","):
                kernel.max_threads *= int(dim)
        self.pos += 1
        self.body(kernel)
        self.module.kernels[kernel.name] = kernel

    def body(self, kernel: Kernel) -> None:
        scopes: list[dict[str, str]] = [{}]
        serial = 0
        while self.skip_space():
            char = self.text[self.pos]
            if char == "}":
                self.pos += 1
                scopes.pop()
                if not scopes:
                    self.resolve_labels(kernel)
                    return
                continue
            if char == "{":
                self.pos += 1
                serial += 1
                scopes.append({})
                # Labels are visible in their whole scope, before they are defined too.
                inner = self.text[self.pos : self._matching_brace(self.pos - 1)]
                for name in re.findall(rf"(?:^|[;{{}}\n])\s*({_IDENT})\s*:(?!:)", inner):
                    scopes[-1][name] = f"{name}#{serial}"
                    self.symbols.add(f"{name}#{serial}")
                continue
            label = _LABEL.match(self.text, self.pos)
            if label:
                self.advance(label.end())
                name = self.lookup(scopes, label.group(1))
                self.skip_space()
                if self.text.startswith(".branchtargets", self.pos):
                    statement = self.advance(self._statement_end())
                    self.pos += 1
                    targets = statement.split(None, 1)[1]
                    kernel.branch_targets[name] = tuple(t.strip() for t in targets.split(","))
                else:
                    kernel.labels[name] = len(kernel.instrs)
                continue
            if re.compile(r"\.loc\s").match(self.text, self.pos):
                self.advance(self._line_end())
                continue
            line = self.line
            statement = self.advance(self._statement_end()).strip()
            self.pos += 1
            if not statement or statement.startswith(".pragma"):
                continue
            if statement.startswith(".reg"):
                self.declare_registers(statement, kernel, scopes[-1], serial if len(scopes) > 1 else 0)
            elif statement.startswith("."):
                rename = {}
                if len(scopes) > 1:
                    match = _VAR_DECL.match(statement)
                    if match:
                        rename[match.group(4)] = scopes[-1][match.group(4)] = f"{match.group(4)}#{serial}"
                        self.symbols.add(f"{match.group(4)}#{serial}")
                self.declare(statement, kernel.variables, rename)
            else:
                kernel.instrs.append(self.instruction(statement, line, scopes))
        raise self.fail("kernel without closing brace")

    @staticmethod
    def lookup(scopes: list[dict[str, str]], name: str) -> str:
        for scope in reversed(scopes):
            if name in scope:
                return scope[name]
        return name

    def declare_registers(self, statement: str, kernel: Kernel, scope: dict[str, str], serial: int) -> None:
        match = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", statement, re.S)
        if not match:
            raise self.fail(f"cannot parse {statement!r}")
        dtype, names = match.groups()
        if dtype not in TYPE_BYTES:
            raise self.fail(f"register type .{dtype}")
        for item in split_operands(names):
            many = _REG_DECL.fullmatch(item.strip())
            declared = [f"{many.group(1)}{i}" for i in range(int(many.group(2)))] if many else [item.strip()]
            for name in declared:
                unique = name if serial == 0 else f"{name}#{serial}"
                scope[name] = unique
                kernel.regs[unique] = dtype

    def instruction(self, statement: str, line: int, scopes: list[dict[str, str]]) -> Instr:
        pred = None
        text = " ".join(statement.split())
        body = text
        guard = re.match(rf"@(!?)\s*({_IDENT})\s+", body)
        if guard:
            pred = Reg(self.lookup(scopes, guard.group(2)), guard.group(1) == "!")
            body = body[guard.end() :]
        parts = body.split(None, 1)
        opcode, *mods = parts[0].split(".")
        operand_text = parts[1] if len(parts) > 1 else ""
        operands = tuple(self.operand(t, scopes) for t in split_operands(operand_text))
        return Instr(opcode, tuple(mods), operands, pred, line, text)

    def operand(self, text: str, scopes: list[dict[str, str]]) -> Operand:
        if text.startswith(("{", "(")):
            return Vec(tuple(self.operand(t, scopes) for t in split_operands(text[1:-1])))
        if text.startswith("["):
            return self.address(text[1:-1].strip(), scopes)
        literal = parse_literal(text)
        if literal:
            return literal
        if "|" in text:
            first, second = text.split("|")
            return Pair(self.operand(first.strip(), scopes), self.operand(second.strip(), scopes))
        if text.startswith("!"):
            return Reg(self.lookup(scopes, text[1:].strip()), True)
        name = self.lookup(scopes, text)
        if name in self.symbols:
            return Sym(name)
        if text.startswith("%") or name != text or text in scopes[0] or text == "_":
            return Reg(name)
        match = re.fullmatch(rf"({_IDENT})\s*\+\s*(-?\w+)", text)
        if match:
            return Sym(self.lookup(scopes, match.group(1)), int(match.group(2), 0))
        if re.fullmatch(_IDENT, text):
            return Sym(text)
        raise self.fail(f"cannot parse operand {text!r}")

    def address(self, text: str, scopes: list[dict[str, str]]) -> Mem:
        base_text, *rest = split_operands(text)
        coords = self.operand(rest[0], scopes) if rest else None
        if coords is not None and not isinstance(coords, Vec):
            raise self.fail(f"cannot parse address [{text}]")
        match = re.fullmatch(rf"({_IDENT}|-?\w+)\s*(?:([+-])\s*(-?\w+))?", base_text)
        if not match:
            raise self.fail(f"cannot parse address [{text}]")
        offset = int(match.group(3), 0) if match.group(3) else 0
        base = self.operand(match.group(1), scopes)
        if isinstance(base, Sym) and base.name in scopes[0]:
            base = Reg(base.name)
        if not isinstance(base, Reg | Sym | Imm):
            raise self.fail(f"cannot parse address [{text}]")
        return Mem(base, -offset if match.group(2) == "-" else offset, coords)

    def resolve_labels(self, kernel: Kernel) -> None:
        def fix(instr: Instr) -> Instr:
            if instr.opcode not in ("bra", "brx"):
                return instr
            known = kernel.labels if instr.opcode == "bra" else kernel.branch_targets
            for item in instr.operands:
                name = item.name if isinstance(item, Sym | Reg) else ""
                if name in known:
                    return instr
            raise PtxError(f"PTX line {instr.line}: branch to an unknown label: {instr.text}")

        for instr in kernel.instrs:
            fix(instr)


def parse(text: str, kernel: str | None = None) -> Module:
    """Parses one PTX module, or only its module-scope variables and the named kernel."""
    return _Parser(text, kernel).parse()
