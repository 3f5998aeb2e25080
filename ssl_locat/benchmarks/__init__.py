"""`ssl-locat bench`: side by side on one machine, as ratios; one module per subject.

Imported by cli. Begin with bench.py, then step.py.
"""
