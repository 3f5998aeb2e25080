"""`ssl-locat bench reliability`: what becomes of samples when jobs are killed and data breaks, here and in six other libraries.

Imported by cli. Begin with scoreboard.py, which says what is done with whom; episodes.py kills and resumes, rank.py reads, peers/ holds one
small file for each library. What a peer needs is installed in an environment of its own, in which these files run, too.
"""
