"""``perdure demo``: kills in the middle of real generations."""
