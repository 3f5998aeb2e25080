"""One self-contained HTML page about one run or several: its text, charts and pictures.

Imported by cli. Begin with command.py, then page.py.
"""
