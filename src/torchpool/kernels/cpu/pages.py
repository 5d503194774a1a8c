"""Large results in large pages.

Memory that a process gets anew is given page by page, when each is first written: for 4 KiB pages
that takes longer than any pooling kernel. Where Linux leaves the choice to programs, a hint before
the first write gives pages of 2 MiB.
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from typing import Any

from torch import Tensor

FRESH = 4 << 20
"""Bytes from which on a tensor is likely to lie in memory that comes from the system anew."""
_HUGE = 2 << 20
_MADV_HUGEPAGE = 14


@lru_cache(maxsize=1)
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def in_large_pages(t: Tensor) -> Tensor:
    """The same tensor, not yet written, whose memory shall come in large pages if it is large."""
    advise = _madvise() if t.nbytes >= FRESH else None
    if advise is not None:
        begin = -(-t.data_ptr() // _HUGE) * _HUGE
        advise(begin, t.data_ptr() + t.nbytes - begin, _MADV_HUGEPAGE)
    return t
