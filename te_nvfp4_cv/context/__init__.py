"""The room context."""
