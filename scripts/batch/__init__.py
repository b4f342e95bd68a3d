"""Batch files: the lines of a file as requests, and their answers as the lines of another."""
