"""``python -m mpchannel bench``: what mpchannel and others need for the same, measured in rounds in one run.

channels     channels and ``multiprocessing.Pipe``
pools        ``WorkerPool`` and other pools of processes (``--pools``)
figures      what both need: where it was measured, and how figures are shown
command      the options
"""
