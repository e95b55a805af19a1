"""What kind of machine something was measured on."""

import contextlib
import os
import platform
import sys
from typing import Any

from cpdlm.processes import processor


def hardware() -> dict[str, Any]:
    """Kind of machine, never its name. Memory in GiB; threads are torch's. Without torch, what it knows is None.

    instructions: those of the processor that bfloat16 is fast with, and AVX-512, in the order of their speed.
    """
    torch = sys.modules.get("torch")
    accelerator = "none"
    if torch is not None and torch.cuda.is_available():
        accelerator = str(torch.cuda.get_device_name(0))
    memory = None
    with contextlib.suppress(ValueError, OSError, AttributeError):
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": cores,
        "threads": torch.get_num_threads() if torch is not None else None,
        "memory_gib": memory,
        "instructions": _instructions(torch) if torch is not None else None,
        "accelerator": accelerator,
    }


def _instructions(torch: Any) -> list[str]:
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # torch 2.11 has none
    return [name for name in ("avx512_f", "avx512_bf16", "amx_bf16") if known.get(name)]
