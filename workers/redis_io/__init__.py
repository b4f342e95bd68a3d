"""The thread that talks to Redis for this worker's requests: claims, checkpoints, renewals, ends."""
