"""Where weights come from: folders, GGUF files, packages, and a tiny model that is made."""
