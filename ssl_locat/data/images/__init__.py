"""From an image's bytes to decoded pixels and multi-crop views; every random draw is a function of a seed.

Imported by data.shards (sizes, packing), data.stream, evaluation, pretraining, measure. Begin with decode.py, then crops.py.
"""
