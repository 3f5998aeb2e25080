"""Student/teacher self-distillation: the loop, what stands before it and after it, and what it is put together from.

Imported by report, benchmarks, cluster, doctor, cli. Begin with loop.py: one step on one screen.
"""
