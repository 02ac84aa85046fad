"""The room conv."""
