"""The room norm."""
