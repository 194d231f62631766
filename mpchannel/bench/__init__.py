"""``python -m mpchannel bench``: what mpchannel and others need for the same, measured in rounds in one run.

channels     channels and ``multiprocessing.Pipe``: the table of scenarios, how they run, and how they are shown
talk, ends   the scenarios: of messages, and of ends
goals        what each scenario is to reach
chart        their figures as a picture
kinds        what is measured, and all that a scenario may know of it
pools        ``WorkerPool`` and other pools of processes (``--pools``)
figures      what channels and pools need: where it was measured, and how figures are shown
command      the options
"""
