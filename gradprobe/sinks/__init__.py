"""Bridges to loggers: the same rows that the run file holds, as scalars. Each imports its logger when it is made."""
