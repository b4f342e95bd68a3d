"""The process beside every worker, and what a worker does so that its end is seen, whatever ends it."""
