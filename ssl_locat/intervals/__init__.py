"""How sure a figure is: the one place for intervals, ties and verdicts.

`figures.py` speaks of a figure of which only the value and a count are known (a share of test images, the mean of some runs) and imports nothing;
`paired.py` of two networks whose answers to each test image are known. Imported by runs (what `doctor` and `report` call noise),
evaluation (`compare`), pretraining (online probes, adapt's guard) and tables (ties). Begin with figures.py.
"""
