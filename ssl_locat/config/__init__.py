"""The YAML's schema, how YAML files are read, and the reference page made from the schema.

Imported by every room that is given settings. Begin with schema.py: the tree of frozen models is the whole list of keys.
"""
