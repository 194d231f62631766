"""``python -m mpchannel demo``: channels at work on real files, small enough to copy from.

channel, worker, stream     one demo each, from the simplest on
search                      the job they do: lines of text files that match a pattern
offload                     a pool of workers, a bar for each call, and a worker that is killed
children                    child processes that never outlive the demo
progress, table             what the terminal shows
command                     the options
"""
