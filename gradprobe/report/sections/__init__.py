"""One part of the report a file: pure functions from material and comparison to a section."""
