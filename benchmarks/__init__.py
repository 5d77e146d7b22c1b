"""Measurements that take minutes to hours; nothing here is part of the package."""
