"""The commands of `python -m twilight_ops`, one file each."""
