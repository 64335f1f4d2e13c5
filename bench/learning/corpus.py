"""Real text that comes with every Python: the source of its standard library.

The text differs a little between Python versions, so results carry its hash.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Modules of one file each that exist in every version from 3.10 on. Validation is on whole modules never trained on.
TRAIN_MODULES = """
_pydecimal argparse ast asyncio/base_events bdb bz2 calendar cmd codecs collections/__init__ concurrent/futures/_base
configparser contextlib copy csv dataclasses difflib dis doctest email/_header_value_parser email/message enum
filecmp fileinput fractions ftplib functools gettext gzip heapq hmac html/parser http/client http/cookiejar
http/server imaplib inspect ipaddress json/decoder json/encoder linecache locale logging/__init__ logging/config
logging/handlers lzma mailbox mimetypes multiprocessing/managers multiprocessing/pool ntpath optparse os pdb pickle
pickletools pkgutil platform plistlib poplib posixpath pprint profile pstats pydoc queue random selectors shelve
shlex shutil smtplib socket socketserver ssl stat statistics subprocess
"""
VALIDATION_MODULES = """
tarfile tempfile textwrap threading tokenize traceback typing unittest/case urllib/parse urllib/request uuid weakref
xmlrpc/client
"""


@dataclass(frozen=True)
class Corpus:
    """Bytes of the train and validation text, uint8 [length] each, and the SHA-256 of both together."""

    train: Tensor
    validation: Tensor
    sha256: str


def load() -> Corpus:
    """Read the corpus from the running Python. FileNotFoundError where it comes without its library's source."""
    train, validation = _read(TRAIN_MODULES), _read(VALIDATION_MODULES)
    digest = hashlib.sha256(train + validation).hexdigest()
    return Corpus(_as_tensor(train), _as_tensor(validation), digest)


def _read(modules: str) -> bytes:
    library = Path(sysconfig.get_path("stdlib"))
    return b"\n".join((library / f"{module}.py").read_bytes() for module in modules.split())


def _as_tensor(text: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())
