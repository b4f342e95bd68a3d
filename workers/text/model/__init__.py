"""The built-in model: its layers, its memory of keys and values, and what makes it exact."""
