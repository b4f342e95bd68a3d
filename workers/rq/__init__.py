"""RQ's worker class, and what of RQ a pool of Perdure keeps: its scheduler, callbacks, dependencies, plain jobs."""
