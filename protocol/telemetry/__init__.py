"""Logs, measures and traces."""
