"""What is measured, and how: the code of scripts/bench."""
