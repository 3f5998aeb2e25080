"""What a user would write: filters for data.train by their dotted names."""

import random

import numpy as np
import torch
import webdataset


def shout(sample):
    return sample | {"__key__": sample["__key__"].upper()}


def draw(samples):
    for sample in samples:
        drawn = [random.random(), float(np.random.random()), float(torch.rand(()))]
        yield sample | {"txt": repr(drawn)}


def fails_on_3(sample):
    if sample["__key__"].endswith("3"):
        raise ValueError("no threes here")
    return sample


def twice(samples):
    for sample in samples:
        yield from (sample, sample)


renamed = webdataset.rename(image="png")
decoded = webdataset.decode("rgb8")
both = [webdataset.decode("torchrgb"), shout]
shuffled = webdataset.shuffle(100)
none = webdataset.map(fails_on_3, handler=webdataset.ignore_and_continue)
number = 3


def no_sample(sample):
    return sample["png"]
