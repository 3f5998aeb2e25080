"""Tables of models x protocols, our number beside the published one: what a table's YAML may say, how its rows are trained where they come
without weights, how its cells are measured, what all of it would cost, and how it is written and drawn.

Imported by cluster, cli. Begin with table.py.
"""
