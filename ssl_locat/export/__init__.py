"""From a run to a folder that timm, Hugging Face or ONNX users load, with its model card, and the upload to the hub.

Imported by pretraining (a finished run exports itself), cli. Begin with export.py.
"""
