"""What a person types: the ``perdure`` command, and the processes behind it."""
