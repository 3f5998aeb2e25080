"""Exact byte ranges of objects on a local disk, s3, gs, http(s), hf or what else fsspec knows, retried against a time budget, and a page cache before
slow ones.

Imported by data.shards, data.stream, pretraining and evaluation (which open a store). Begin with store.py.
"""
