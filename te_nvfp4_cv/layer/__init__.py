"""The room layer."""
