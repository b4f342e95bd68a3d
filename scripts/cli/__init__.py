"""The commands of ``perdure``, a file each."""
