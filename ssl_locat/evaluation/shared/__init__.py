"""What protocols have in common: samples, features, metrics, heads, dense data sets, options and their checks.

Imported by evaluation.protocols, evaluation, report. Begin with features.py: frozen features of a set of images.
"""
