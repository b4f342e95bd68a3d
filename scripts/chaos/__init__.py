"""``perdure chaos``: real processes under faults, judged by counting.

The way of a run: :mod:`.schedule` makes times and faults of a seed, :mod:`.conductor` runs them against the
processes of :mod:`.crew`, :mod:`.load` produces and writes down what it was promised, :mod:`.evidence` reads that and
what Redis holds, :mod:`.judge` counts. No worker is believed.
"""
