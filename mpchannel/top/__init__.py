"""``python -m mpchannel top PID``: who holds which end of which channel, and what waits where, looked at from outside.

snapshot    one look at a tree of processes, by /proc and the kernel's socket diagnosis
graph       a look as a picture (SVG, HTML)
command     the options; tables, JSON, and the live view (with rich)

The processes looked at are not asked and not disturbed: it works on those that are stopped or stuck.
"""
