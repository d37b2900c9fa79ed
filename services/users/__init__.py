"""Users: accounts, sessions and the keys that access tokens are signed with.

Owns the schema `users`. Serves registration, sessions, passwords, the own account, public profiles, administration and
the JWK set. Consumes nothing. Produces on `users.events`: `user.registered.v1`, `user.updated.v1`,
`user.verification_requested.v1`, `user.password_reset_requested.v1`, `user.password_changed.v1`, `user.deleted.v1`.
"""
