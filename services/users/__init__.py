"""Users: accounts, sessions and the keys that access tokens are signed with.

Owns the schema `users`. Serves registration, sessions, the own account, public profiles and the JWK set.
Consumes nothing. Produces `user.registered.v1` and `user.updated.v1` on `users.events`.
"""
