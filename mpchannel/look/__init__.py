"""Looking at a program from outside: ``python -m mpchannel trace`` and ``python -m mpchannel top``.

trace          what a trace says: a table, and a picture
processes      what the kernel tells of processes, ends and queues; who waits for whom
graph          that as a drawing
top            that as tables, once or live
"""
