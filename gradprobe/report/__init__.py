"""One self-contained HTML file from a comparison and its run files. Pure functions to dicts; one template."""
