"""Value heads: what they compute, how they are stored, trained and judged. Knows nothing of the server."""
