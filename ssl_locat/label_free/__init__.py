"""Label-free measures of representation quality, one file each: pure functions of features, which know neither models nor data.

Imported by runs (collapse metrics), evaluation (the protocol `unlabelled`), report. Begin with rankme.py, the shortest; dse.py is the
one that is made for dense features.
"""
