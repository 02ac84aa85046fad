"""Does accuracy hold? Paired runs of small networks on real images, in high precision and in NVFP4 and its ablations.

study.py trains and appends one line per run to a results file; table.py turns that file into tables.
"""
