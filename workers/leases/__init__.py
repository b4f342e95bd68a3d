"""What this worker holds, where the engine loop and the thread that talks to Redis meet."""
