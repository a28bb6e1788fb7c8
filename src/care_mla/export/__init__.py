"""Converted models as checkpoints of stock classes, one file a target."""
