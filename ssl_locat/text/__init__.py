"""Text that leaves the package: what may be shown or written, and what is taken out of it first.

Imported by every room that prints, logs or writes, `errors` included: it stands on the ground. Begin with shown.py.
"""
