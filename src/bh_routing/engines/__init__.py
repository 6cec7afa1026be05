"""Bridges to other programs. Nothing here is imported by the library itself."""
