"""Notifier: tells people what happened, in their inbox, on their live stream and by email.

Owns the schema `notifier`, with its own projection of users. Serves the inbox and the stream (`api`); consumes
`users.events` (accounts that come, change and go, links to be sent), `media.processed.v1` and `media.failed.v1` from
`media.events`, and sends the email (`worker`). Produces nothing.
"""
