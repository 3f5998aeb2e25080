"""Where a command runs: this machine, torchrun or Slurm, and the list of what was queued. A job is a command line that runs
elsewhere; what runs it there (worker/) stands above the commands and is only named here.

Imported by doctor (ranks of a profile), worker, cli. Begin with launch.py.
"""
