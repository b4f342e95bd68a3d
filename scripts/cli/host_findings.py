"""What ``perdure doctor`` finds on this machine: whether a worker that is started here would work."""

from __future__ import annotations

import os
import resource
import shutil
from importlib.util import find_spec
from typing import Final

from rq.version import VERSION

from ...protocol.settings import Settings
from ...workers.pool.gpus import count_by_torch
from ..present.reading import size
from .findings import Finding, Level

FILES: Final = 1024
SHARED: Final = 1024**3


def examine_host(settings: Settings) -> list[Finding]:
    """What a worker that is started here would meet."""
    driver = os.path.exists("/dev/nvidiactl")  # noqa: PTH110
    shared = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None  # noqa: PTH112
    return judge_host(
        rq=VERSION,
        files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        shared=shared,
        settings=settings,
        driver=driver,
        devices=_devices(settings, driver=driver),
    )


def _devices(settings: Settings, *, driver: bool) -> int | None:
    """CUDA devices that torch sees; ``None`` without torch. It is asked, slowly, only where there may be one."""
    if find_spec("torch") is None:
        return None
    return count_by_torch() if driver or settings.device.startswith("cuda") else 0


def judge_host(
    *, rq: str, files: int, shared: int | None, settings: Settings, driver: bool, devices: int | None
) -> list[Finding]:
    """The findings from what was read; ``shared`` is the size of /dev/shm, ``driver`` whether NVIDIA's is there."""
    from ...workers.rq.arrival import TESTED_RQ

    found = []
    if not rq.startswith(tuple(f"{release}." for release in TESTED_RQ)) and not settings.untested_rq:
        why = f"workers do not start; tested are {', '.join(TESTED_RQ)}"
        found.append(Finding(Level.FAIL, f"RQ {rq} was not tested", why, f"pip install 'rq~={TESTED_RQ[-1]}.0'"))
    if 0 <= files < FILES:
        found.append(
            Finding(
                Level.WARN,
                f"a process may have {files} open files",
                "a worker needs up to a few hundred",
                f"ulimit -n {FILES}",
            )
        )
    if settings.ranks > 1 and shared is not None and shared < SHARED:
        why = "collectives between processes use it"
        found.append(Finding(Level.WARN, f"/dev/shm has {size(shared)}", why, "docker run --shm-size=1g"))
    if devices is None:
        found.append(
            Finding(
                Level.OK, "torch is not installed here: this machine can submit requests, not run the built-in models"
            )
        )
    elif driver and not devices:
        why = "torch is built without CUDA, the driver is too old, or CUDA_VISIBLE_DEVICES hides all devices"
        found.append(
            Finding(
                Level.WARN,
                "an NVIDIA driver is here, and torch sees no device",
                why,
                "pip install torch from an index with CUDA",
            )
        )
    elif settings.device.startswith("cuda") and not devices:
        found.append(
            Finding(
                Level.FAIL,
                f"PERDURE_DEVICE is {settings.device}, and torch sees no device",
                "workers do not start",
                "PERDURE_DEVICE=auto",
            )
        )
    else:
        found.append(
            Finding(Level.OK, f"torch sees {devices} CUDA devices" if devices else "workers here compute on the CPU")
        )
    return found
