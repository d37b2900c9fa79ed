"""All the SQL of users, by noun, a function a question."""
