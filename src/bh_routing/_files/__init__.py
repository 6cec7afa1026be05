"""Files that are written whole, and read with everything in them checked: plain ones, values out of JSON, named tensors."""

from .plain import append_line, read_lines, write_atomically, write_folder

__all__ = ["append_line", "read_lines", "write_atomically", "write_folder"]
