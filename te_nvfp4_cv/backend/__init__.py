"""The room backend."""
