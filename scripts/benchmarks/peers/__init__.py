"""One file for each system that is measured: its task, its producer, its settings.

They run by path in environments of their own, where Perdure is not installed, so they import nothing of it
(but ours) and share :mod:`kit` alone. Their names begin with ``bench_``: a ``celery.py`` beside them would be
taken for the package.
"""
