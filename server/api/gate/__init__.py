"""What every request passes before it reaches a route: identity and access log, header size, host, key, body, limits.

From the outside in, behind the origins that browsers are told (server/app.py): `identity`, which also writes the access
log; `HeadAsGet`; traces if there are any; `sizes.HeaderLimit`; `HostGuard`, mostly where there are no keys; `auth`;
`sizes.BodyLimit`; `quota`. Who is slow to send a body takes no place meanwhile. Knows no route and no engine.
"""
