"""One file per protocol, each with `evaluate(backbone, *, ...) -> dict[str, float]` whose keyword arguments are the protocol's
YAML (eval/NAME.yaml).

Imported by evaluation; the table PROTOCOLS in evaluation/__init__.py names them. Begin with knn.py, the shortest.
"""
