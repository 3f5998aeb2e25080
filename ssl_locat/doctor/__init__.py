"""`doctor` and `init`: what is measured below, in words, before anyone waits.

Imported by cli. Begin with doctor.py.
"""
