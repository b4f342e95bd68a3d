"""``scripts/exactness``: what an interruption changes of an answer, by engine. From a checkout alone."""
