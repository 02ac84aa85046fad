"""The room triton."""
