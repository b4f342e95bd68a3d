"""What happens when what runs a request is gone.

:class:`Reaper` takes requests from the dead and moves what is due; :mod:`.failures` says what kind of
failure an error is and what follows from it, :mod:`.deaths` what the end of a process is; :mod:`.degradation`
decides whether the pool has lost too many workers; :class:`Snapshots` keeps on disk what a worker has gathered over
many requests. Everything that moves a request is a script of :mod:`perdure.protocol`: of requests this package decides
nothing between two calls, and of the mode only what the script still finds as it was, so that any number of reapers may
run.
"""

from .deaths import Death, device_kind
from .failures import POLICIES, Policy, classify, describe, failure, lost_peer
from .reaper import Reaper
from .snapshots import Snapshot, Snapshots

__all__ = [
    "Reaper", "Policy", "POLICIES", "Death", "classify", "describe", "device_kind", "failure", "lost_peer",
    "Snapshots", "Snapshot",
]  # fmt: skip
