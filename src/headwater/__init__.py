"""Headwater: sparse reward upstream, dense teacher supervision downstream, every label accounted for."""

__version__ = "0.1.0"
