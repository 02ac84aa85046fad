"""Try a model: train a step of it in NVFP4, compile, checkpoint, save, export and fuse it, and say what held.

    te-nvfp4-cv try MODULE:FUNCTION --input 3 64 64      one model of yours                     cli/models.py
    examples/zoo/                                        a table of models of other libraries

A check compares NVFP4 with NVFP4 where bits are owed, and with high precision where they are not. What plain torch
cannot do with a model either is no finding.
"""
