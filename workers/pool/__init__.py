"""``perdure up``: the processes of one host's pool, their places, and their ends."""
