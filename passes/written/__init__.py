"""A program as JSON data, and back: what it says is rebuilt, nothing of it is executed.

A program read back runs, but has no fake values, so that no pass can rewrite it further. What it
may call is limited to operators without side effects on anything but its own caches: data that
comes from elsewhere cannot run code, and sizes in it are checked before memory is taken.
"""

from spdcompile.passes.written.reading import from_data
from spdcompile.passes.written.writing import NotSerializableError, to_data

__all__ = ["NotSerializableError", "from_data", "to_data"]
