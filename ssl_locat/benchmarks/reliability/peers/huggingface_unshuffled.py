"""Hugging Face datasets without a shuffle buffer, which its state does not hold: what a kill then costs."""

from ssl_locat.benchmarks.reliability.peers import huggingface

write, FORMAT = huggingface.write, huggingface.FORMAT


class Reader(huggingface.Reader):
    BUFFER = 0
