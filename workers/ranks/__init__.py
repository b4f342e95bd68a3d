"""A worker that is a group of processes, for models that need more than one device."""
