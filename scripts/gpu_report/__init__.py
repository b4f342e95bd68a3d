"""``scripts/gpu-report``: what only a GPU can show, as one command that is rehearsed on the CPU.

:mod:`.pack` fetches what a bare machine lacks, :mod:`.place` makes an environment of it there, :mod:`.runner` runs
the steps of :mod:`.plan`, each as a process of its own (:mod:`.stage`), and :mod:`.page` writes down what they found.
"""
