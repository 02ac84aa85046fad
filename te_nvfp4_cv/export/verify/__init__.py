"""Check exported files: the precision that each layer really has, against what the file says."""
