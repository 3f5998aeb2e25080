"""The command line: what `ssl-locat COMMAND` takes, and how a process of it ends.

Imported by worker, __main__. Begin with commands.py (those of shards: shards.py); process.py turns what a command raises into a message and an exit code.
"""

from ssl_locat.cli.commands import app
from ssl_locat.cli.process import leave, main, run_command

__all__ = ["app", "leave", "main", "run_command"]
