"""What is measured, each by a module that can be run: ``python -m perdure.scripts.benchmarks.NAME``."""
