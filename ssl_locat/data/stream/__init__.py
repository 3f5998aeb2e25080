"""The endless training stream: a pure function of (seed, position) whose state is one integer, read ahead by worker processes.

Imported by pretraining, evaluation, benchmarks. Begin with plan.py for the order, stream.py for the reading.
"""
