"""``python -m benchmarks``: mpchannel, ``multiprocessing.Pipe`` and others, measured side by side in one run.

peers       the others, as further kinds of ``mpchannel.bench``, which has the scenarios and runs them
report      the figures as Markdown
__main__    the options
"""
