"""How answers come back: what is asked of Redis, and in which order."""
