"""Measure whether accuracy holds in NVFP4.

The study trains small networks on real images, in high precision, in NVFP4 and in ablations of NVFP4, each from the
same seeds. study.py trains and appends one line per run to a results file; table.py turns that file into tables;
deploy.py measures quantized and exported networks.
"""
