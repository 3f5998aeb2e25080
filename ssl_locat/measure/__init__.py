"""What measures this machine, a training step, or a sample of images. It is given what to run and look at, and knows no config's
meaning.

Imported by pretraining, doctor. Begin with images.py.
"""
