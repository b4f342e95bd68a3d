"""What computes: each engine is a folder here, and does what :class:`.base.TextEngine` says."""
