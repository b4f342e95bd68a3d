"""The processes of a pool on this machine, and a Redis of its own."""
