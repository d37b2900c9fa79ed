"""Notifier: tells people what happened, in their inbox, on their live stream, by email and by webhook.

Owns the schema `notifier`, with its own projection of users. Serves the inbox, the stream, preferences, webhooks,
campaigns and unsubscription (`api`); consumes `users.events` (accounts that come, change and go, links to be sent) and
`media.processed.v1` and `media.failed.v1` from `media.events`, and sends the email and the webhooks (`worker`).
Produces `campaign.created.v1` and `campaign.chunk_queued.v1` on `notifier.events`, for itself: the steps in which
campaigns are prepared.
"""
