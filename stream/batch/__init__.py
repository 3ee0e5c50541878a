"""Many questions about many videos: a manifest in, one line for each row out, nothing lost.

manifest.py reads rows, worker.py does one video, cache.py keeps reduced tokens, pool.py runs
workers over Ray, journal.py remembers what is done, folder.py holds a run, output.py writes.
"""
