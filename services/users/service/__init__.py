"""The use cases of users, by noun. Each owns its transaction; none knows HTTP or SQL."""
