"""One part of the report a file: pure functions from study and comparison to a section."""
