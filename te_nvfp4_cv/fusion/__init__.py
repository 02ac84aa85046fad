"""The room fusion."""
