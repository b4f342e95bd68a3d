"""The engine loop: it admits requests to a task, steps them, and hands over what they put out. It knows no Redis."""
