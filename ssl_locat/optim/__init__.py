"""AdamW's parameter groups, gradient clipping, and the schedules of rates.

Imported by objectives, pretraining, evaluation. Begin with schedules.py, one function of progress.
"""
