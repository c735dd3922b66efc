"""The most memory a process has had."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_bytes() -> int:
    """Peak resident bytes of this process.

    On Linux from the kernel's high-water mark of its address space: ``getrusage`` also counts what the parent had
    when it forked, until this process replaced its memory.
    """
    if STATUS.exists():
        kibibytes = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(encoding="ascii"), re.MULTILINE)
        if kibibytes:
            return 1024 * int(kibibytes[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts in bytes, others in KiB.
    return peak if sys.platform == "darwin" else 1024 * peak
