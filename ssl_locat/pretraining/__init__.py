"""Student/teacher self-distillation: the loop, what stands before it and after it, and what it is put together from.

`adapt` stands here, too: adapt.py chooses what continues given weights, guard.py hands them back unless a checkpoint is better.

Imported by report, benchmarks, cluster, doctor, cli. Begin with loop.py: one step on one screen.
"""
