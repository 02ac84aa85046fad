"""The room ptq."""
