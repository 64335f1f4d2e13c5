"""The simulated CUDA runtime: loads libraries, takes their launches, owns device memory."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.machinery
import importlib.util
import os
import struct
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from . import elf, toolchain
from .faults import SimError
from .machine import Choice, Launcher
from .memory import READY, GlobalMemory
from .program import decode
from .ptx import Kernel, Module, parse
from .wave import Counters, Device

CUDA_SUCCESS, INVALID_VALUE, MEMORY_ALLOCATION, INVALID_CONFIGURATION = 0, 1, 2, 9
NO_KERNEL_IMAGE, INVALID_POINTER, INVALID_DEVICE_FUNCTION, LAUNCH_FAILURE = 209, 17, 98, 719
_NAMES = {
    CUDA_SUCCESS: "no error",
    INVALID_VALUE: "invalid argument",
    MEMORY_ALLOCATION: "out of memory",
    INVALID_CONFIGURATION: "invalid configuration argument",
    NO_KERNEL_IMAGE: "no kernel image is available for execution on the device",
    INVALID_POINTER: "invalid device pointer",
    INVALID_DEVICE_FUNCTION: "invalid device function",
}
_MAX_DYNAMIC_SHARED = 8  # cudaFuncAttributeMaxDynamicSharedMemorySize
_OPTIN = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227}

_P, _I, _S = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "register_image": (None, _I, _P),
    "register_function": (None, _I, _P, ctypes.c_char_p),
    "register_variable": (None, _I, _P, ctypes.c_char_p, _S),
    "launch": (_I, _P, ctypes.POINTER(ctypes.c_uint), _S, ctypes.POINTER(_P), _P),
    "allocate": (_P, _S),
    "release": (_I, _P),
    "written": (None, _P, _S),
    "cleared": (None, _P),
    "set_attribute": (_I, _P, _I, _I),
    "get_attribute": (_I, _P, _I),
    "symbol": (_P, _P),
    "message": (_P, _I),
}


class _Callbacks(ctypes.Structure):
    _fields_ = [(name, ctypes.CFUNCTYPE(*signature)) for name, signature in _SIGNATURES.items()]


@dataclass
class Image:
    """One fat binary: its PTX and, once parsed, its kernels."""

    text: str | None
    why_not: str = ""
    kernels: dict[str, tuple[Module, Kernel]] = field(default_factory=dict)
    symbols: dict[str, int] = field(default_factory=dict)


@dataclass
class Function:
    name: str
    image: Image
    dynamic_limit: int = 48 * 1024


@dataclass
class Launch:
    """A record of one launch, for tests that look at grids and traffic."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    counters: Counters
    overlaps: bool = False  # with the kernel before it in the stream
    holds_gil: bool = False  # while it launches


def fatbin_ptx(address: int, compute_capability: tuple[int, int]) -> tuple[str | None, str]:
    """The PTX of a fat binary that suits the device best, or None and the reason.

    Layout: a 16-byte header (magic, version, header size, bytes that follow), then entries of a header (kind 1 = PTX;
    its size at byte 4, payload size at 8, flags at 40) and a payload.
    """
    magic, _, header, size = struct.unpack("<IHHQ", ctypes.string_at(address, 16))
    if magic != 0xBA55ED50:
        return None, f"unknown fat binary magic {magic:#x}"
    data = ctypes.string_at(address + header, size)
    offset, found = 0, []
    while offset + 48 <= len(data):
        kind, _, head, payload = struct.unpack_from("<HHIQ", data, offset)
        flags = struct.unpack_from("<Q", data, offset + 40)[0]
        if kind == 1:
            if flags & 0xA000:
                return None, "its PTX is compressed: build with nvcc --no-compress"
            text = data[offset + head : offset + head + payload].rstrip(b"\0").decode()
            target = text.split(".target", 1)[1].split()[0].rstrip(",").removeprefix("sm_")
            level = int(target.rstrip("af"))
            wanted = compute_capability[0] * 10 + compute_capability[1]
            if (level == wanted) if target[-1] == "a" else level <= wanted:
                found.append((level, target[-1] == "a", text))
        offset += head + payload
    if not found:
        return None, f"no PTX for compute capability {compute_capability[0]}.{compute_capability[1]} in it"
    return max(found)[2], ""


class Runtime:
    """One simulated device with the libraries loaded for it. A process has at most one: use `Runtime.get()`."""

    _instance: Runtime | None = None

    def __init__(self, compute_capability: tuple[int, int] = (8, 0)) -> None:
        self.memory = GlobalMemory()
        self.compute_capability = compute_capability
        self.images: dict[int, Image] = {}
        self.functions: dict[int, Function] = {}
        self.variables: dict[int, tuple[Image, str]] = {}
        self.launches: list[Launch] = []
        self.queue: deque[tuple[str, int]] = deque(maxlen=1000)  # the latest kernels and memsets, each with its stream
        self.poison_shared = False
        self.choice: Choice | None = None  # of the blocks to run; None: all
        self.error: BaseException | None = None
        self._launchers: dict[int, Launcher] = {}
        self._text = ctypes.create_string_buffer(b"")
        self._keep = {
            name: ctypes.CFUNCTYPE(*signature)(getattr(self, f"_{name}")) for name, signature in _SIGNATURES.items()
        }
        self._shim = ctypes.CDLL(str(toolchain.build_shim()))
        self._shim.ptxsim_install(ctypes.byref(_Callbacks(**self._keep)))
        self.select(compute_capability)

    @classmethod
    def get(cls) -> Runtime:
        if cls._instance is None:
            cls._instance = cls()
        return cls._instance

    def select(self, compute_capability: tuple[int, int]) -> None:
        """What the device claims to be, for queries and for the choice of PTX in libraries loaded from here on."""
        self.compute_capability = compute_capability
        self._shim.ptxsim_select(*compute_capability)

    # ---- libraries ------------------------------------------------------------------------------------------------

    def _rebound(self, path: Path) -> Path:
        image = elf.rebind(path.read_bytes())
        digest = hashlib.sha256(image + bytes(self.compute_capability)).hexdigest()  # one copy per choice of PTX
        directory = toolchain.cache_dir() / digest[:24]
        target = directory / path.name
        if not target.exists():
            directory.mkdir(exist_ok=True)
            partial = directory / f".{path.name}.{os.getpid()}"
            partial.write_bytes(image)
            partial.replace(target)
        return target

    def load(self, path: Path) -> ctypes.CDLL:
        """Loads a C shared library; its kernels run on this device."""
        return ctypes.CDLL(str(self._rebound(path)))

    def load_module(self, path: Path, name: str) -> ModuleType:
        """Imports a Python extension module (`name` as compiled into it); it is not entered into sys.modules."""
        target = self._rebound(path)
        loader = importlib.machinery.ExtensionFileLoader(name, str(target))
        spec = importlib.util.spec_from_file_location(name, target, loader=loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        return module

    def check(self) -> None:
        """Raises the fault of the last failed launch, if any, and clears it."""
        error, self.error = self.error, None
        if error is not None:
            raise error

    # ---- callbacks ------------------------------------------------------------------------------------------------

    def _register_image(self, number: int, address: int) -> None:
        self.images[number] = Image(*fatbin_ptx(address, self.compute_capability))

    def _register_function(self, number: int, host: int, name: bytes) -> None:
        self.functions[host] = Function(name.decode(), self.images[number])

    def _register_variable(self, number: int, host: int, name: bytes, size: int) -> None:
        self.variables[host] = (self.images[number], name.decode())

    def _kernel(self, function: Function) -> tuple[Module, Kernel]:
        image = function.image
        if function.name not in image.kernels:
            if image.text is None:
                raise SimError("launch", image.why_not, kernel=function.name)
            module = parse(image.text, function.name)
            if function.name not in module.kernels:
                raise SimError("launch", "the PTX has no such kernel", kernel=function.name)
            for variable in module.variables.values():
                if variable.space in ("global", "const") and variable.name not in image.symbols:
                    address = self.memory.allocate(variable.size, permanent=True)
                    ctypes.memmove(address, (variable.init or b"").ljust(variable.size, b"\0"), variable.size)
                    self.memory.mark(address, variable.size, READY)
                    image.symbols[variable.name] = address
            image.kernels[function.name] = (module, module.kernels[function.name])
        return image.kernels[function.name]

    def _launch(self, host: int, dims: Any, shared: int, args: Any, stream: int | None) -> int:
        grid, block = (dims[0], dims[1], dims[2]), (dims[3], dims[4], dims[5])
        try:
            function = self.functions[host]
            if min(*grid, *block) < 1 or block[0] * block[1] * block[2] > 1024 or max(grid[1:]) > 65535:
                return INVALID_CONFIGURATION
            if shared > function.dynamic_limit:
                return INVALID_VALUE
            cluster = (dims[6], dims[7], dims[8])
            if any(g % c for g, c in zip(grid, cluster, strict=True)) or cluster[0] * cluster[1] * cluster[2] > 16:
                return INVALID_CONFIGURATION
            module, kernel = self._kernel(function)
            if kernel.max_threads is not None and block[0] * block[1] * block[2] > kernel.max_threads:
                return INVALID_VALUE
            packed, top = bytearray(), 0
            for i, param in enumerate(kernel.params):
                top = -(-top // param.align) * param.align
                packed[top:] = b"\0" * (top - len(packed)) + ctypes.string_at(args[i], param.size)
                top += param.size
            launcher = self._launchers.setdefault(
                id(function.image), Launcher(Device(self.memory, function.image.symbols))
            )
            launcher.device.poison_shared = self.poison_shared
            counters = launcher.launch(
                module, kernel, grid, block, shared, bytes(packed), cluster, self.choice, bool(dims[9])
            )
            self.queue.append((kernel.name, stream or 0))
            self.launches.append(Launch(kernel.name, grid, block, shared, counters, bool(dims[9]), bool(dims[10])))
        except BaseException as error:  # SimError; a bug or a test's timeout must not vanish in the C caller either
            self.error = error
            return LAUNCH_FAILURE
        return CUDA_SUCCESS

    def _allocate(self, size: int) -> int | None:
        try:
            return self.memory.allocate(size)
        except MemoryError:
            return None

    def _release(self, pointer: int) -> int:
        if pointer not in self.memory.live:
            return INVALID_POINTER
        self.memory.free(pointer)
        return CUDA_SUCCESS

    def _written(self, pointer: int, size: int) -> None:
        if self.memory.find(pointer) is not None:
            self.memory.mark(pointer, size, READY)

    def _cleared(self, stream: int | None) -> None:
        self.queue.append(("memset", stream or 0))

    def _set_attribute(self, host: int, attribute: int, value: int) -> int:
        function = self.functions.get(host)
        if function is None:
            return 98
        if attribute == _MAX_DYNAMIC_SHARED:
            if value > _OPTIN[self.compute_capability] * 1024:
                return INVALID_VALUE
            function.dynamic_limit = value
        return CUDA_SUCCESS

    def _get_attribute(self, host: int, what: int) -> int:
        function = self.functions.get(host)
        if function is None:
            return -INVALID_DEVICE_FUNCTION
        if function.image.text is None:
            return -NO_KERNEL_IMAGE
        module, kernel = self._kernel(function)
        program = decode(kernel, module.variables)
        return (program.shared_static, kernel.max_threads or 1024, program.local_size)[what]

    def _symbol(self, host: int) -> int | None:
        if host not in self.variables:
            return None
        image, name = self.variables[host]
        for function in self.functions.values():
            if function.image is image and name not in image.symbols:
                self._kernel(function)
        return image.symbols.get(name)

    def _message(self, code: int) -> int:
        text = str(self.error) if code == LAUNCH_FAILURE and self.error else _NAMES.get(code, f"CUDA error {code}")
        self._text = ctypes.create_string_buffer(text.encode())
        return ctypes.addressof(self._text)
