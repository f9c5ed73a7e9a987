"""What every request passes before it reaches a route: identity and access log, header size, key, body, limits.

From the outside in: `identity`, traces if there are any, `sizes.HeaderLimit`, `auth`,
`sizes.BodyLimit`, `quota`: who is slow to send a body takes no place meanwhile. Knows no route
and no engine.
"""
