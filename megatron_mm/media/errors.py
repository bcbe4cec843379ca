"""The error of everything that reads or writes data.

It is the user's to mend (a damaged shard, a bad line, a wrong option), so its message names the file, the record and
the cause.
"""


class DataError(ValueError):
    """Input that cannot be used; the message names the file, the record and what would be right."""
