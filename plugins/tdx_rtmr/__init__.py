"""Registers and quotes of a real TD, through the kernel's interfaces.

Not offered as a plugin yet: what it will implement are the seams that `tdx_sim` already
does, `supervisor.Registers` and `supervisor.QuoteSource`, so that nothing else changes.
"""
