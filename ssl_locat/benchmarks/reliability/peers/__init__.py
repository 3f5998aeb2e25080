"""One file for each library, which uses it as its documentation says: `write(folder, samples)` in its format, and

    Reader(job)         of one rank; `job.state` is what this rank's `save` wrote before the kill, or None
    iter(reader)        batches as `samples.batch` makes them
    reader.save(path)   the state after the last batch that was taken

Imported by name by ../episodes.py, in the environment of that library. Begin with webdataset.py, the shortest.
"""
