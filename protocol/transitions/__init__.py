"""What scripts take and answer, and the transitions of sweeps."""
