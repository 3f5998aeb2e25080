"""Tar shards: parsing, indexing, packing, checking, and a generator of textures to try things out.

Imported by data.stream, evaluation, pretraining, measure, doctor. Begin with index.py: a data set as a list of samples
addressed one by one.
"""
