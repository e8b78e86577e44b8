"""The allocator of a process, which can keep the memory that is freed."""

import ctypes
import logging
import platform


logger = logging.getLogger(__name__)

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def can_keep() -> bool:
    """Whether the allocator of this process is one that can keep what is freed: that of glibc."""
    return platform.libc_ver()[0] == "glibc"


def keep_freed_memory() -> bool:
    """
    Let the allocator of this process keep what it is given back.

    glibc maps every buffer of 32 MiB or more afresh, and each page of it is faulted in and zeroed again: large
    activations pay that at every step. Afterwards freed memory stays with the process and is used again; the process
    then never shrinks below its peak. For the whole process, hence opt-in.

    Returns:
        `bool`: whether the allocator is one that can: glibc. Elsewhere nothing changes, and a warning says so.
    """
    if not can_keep():
        logger.warning("`keep_freed_memory` needs glibc. Got %s: nothing is changed.", platform.platform())
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 64 * 2**20}
    results = [mallopt(parameter, value) for parameter, value in settings.items()]
    return all(result == 1 for result in results)
