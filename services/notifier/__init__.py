"""Notifier: tells people what happened, in their inbox, on their live stream and by email.

Owns the schema `notifier`, with its own projection of users. Serves the inbox and the stream (`api`); consumes
`user.registered.v1` and `user.updated.v1` from `users.events`, `media.processed.v1` and `media.failed.v1` from
`media.events`, and sends the email (`worker`). Produces nothing.
"""
