"""Whether a worker lives, may be given work, and has a device that may be used."""
