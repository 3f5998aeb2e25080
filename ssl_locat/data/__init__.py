"""From bytes on any store to batches of crops, in four rooms: stores (where bytes are), shards (which bytes are a sample),
images (from bytes to crops), stream (which sample comes when).

Imported by evaluation, pretraining, measure, doctor. Begin with stream/plan.py: position -> sample.
"""
