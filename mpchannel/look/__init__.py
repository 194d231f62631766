"""Looking at a program from outside: ``python -m mpchannel trace`` and ``python -m mpchannel top``.

trace          what a trace says: a table, and a picture
"""
