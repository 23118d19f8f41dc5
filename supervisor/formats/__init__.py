"""Bytes <-> meaning. Pure: no I/O, no clock, no trio. Used inside the TD and by verifiers."""
