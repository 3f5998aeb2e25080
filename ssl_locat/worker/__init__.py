"""What runs on every task of a queued job: takes its place among the processes, runs the command line, requeues it when it was
preempted.

Imported by nobody: cluster names it, submitit calls it on the node. Begin with task.py.
"""
