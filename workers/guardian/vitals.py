"""What a guardian does about health: which checks it runs, where they are served, what a heartbeat says of them."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import redis

from ...protocol.settings import Settings
from ..health.checks import Memory, RedisCheck, disk
from ..health.device_watch import DeviceWatch, wanted
from ..health.state import Check, Health, Watched
from .companion import private_connection

DISK_DEADLINE = 10.0
"""Seconds that a synced write of a few kilobytes may take."""

SLOW = 0.05
"""Share of the heartbeat timeout from which a round trip to Redis is slow."""


@dataclass(slots=True)
class Vitals:
    """The health of one worker, as its guardian sees it.

    The device is watched always, as its worker is to leave it; the other checks run only if somebody can ask for them.
    """

    health: Health
    device: str
    url: str
    """Where it is served; an empty text if it is not."""
    watch: DeviceWatch | None

    @classmethod
    def start(
        cls,
        settings: Settings,
        connection: redis.Redis,
        pid: int,
        device: str,
        drains: bool,
        log: logging.Logger,
    ) -> Self:
        """Begin to look, and to serve where settings say so."""
        watch = DeviceWatch(device, log) if wanted(device) else None
        checks: list[Watched] = [watch] if watch else []
        if settings.health_port:
            checks += _checks(settings, connection, pid)
        health = Health(pid, checks, drains=drains, log=log)
        health.start(settings.health_interval)
        url = ""
        if settings.health_port:
            from ..health.server import serve  # its import costs more than all else here

            url = serve(health, settings.health_bind, settings.health_port, log)
        return cls(health, device, url, watch)

    def beat(self) -> dict[str, str]:
        """What the next heartbeat says: the device by its name, why it is unfit, where health is served."""
        unfit = self.health.beat()  # before the name, which is known no later than what is wrong
        known = self.watch.identity if self.watch else ""
        return {"device": known or self.device, "unfit": unfit, "health": self.url}


def _checks(settings: Settings, connection: redis.Redis, pid: int) -> list[Watched]:
    timeout = settings.heartbeat_timeout / 2
    server = RedisCheck(private_connection(connection, timeout=timeout), slow=SLOW * settings.heartbeat_timeout)
    folder = Path(settings.health_folder or settings.trace or tempfile.gettempdir())
    return [
        Check("network", server.look, deadline=4 * timeout),
        Check("memory", Memory(pid).look, deadline=timeout),
        Check("disk", lambda: disk(folder), deadline=DISK_DEADLINE),
    ]
