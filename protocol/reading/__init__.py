"""What is read of requests, workers and the pool's mode, without changing anything."""
