"""A run's folder and what its processes share: checkpoints, logs, collective calls, what a run's numbers mean, the history that
it leaves.

Imported by data-independent rooms above it: models, objectives, evaluation, export, pretraining, report, cluster. Begin with
folder.py for what lies in a run folder, checkpoint.py and marker.py for what a run resumes from, distributed.py for how ranks meet, stop.py for how they end together.
"""
