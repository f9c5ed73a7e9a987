"""What every request passes before it reaches a route: identity and access log, header size, key, limits, body size.

From the outside in: `identity`, traces if there are any, `sizes.HeaderLimit`, `auth`, `sizes.BodyLimit`. Knows no route
and no engine.
"""
