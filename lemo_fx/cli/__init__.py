"""The command `lemo-fx`."""
