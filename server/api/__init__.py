"""The HTTP contract: OpenAI's routes, with `control` beside them. Knows engines only through `server.engines.base`."""
