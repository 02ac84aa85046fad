"""Bring plain torch calls into NVFP4: the context manager, its state, the function mode, patches of torch."""
