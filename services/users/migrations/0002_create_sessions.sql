CREATE TABLE sessions (
    id              uuid PRIMARY KEY,
    account_id      uuid NOT NULL REFERENCES accounts (id) ON DELETE CASCADE,
    device          text NOT NULL,
    address         text NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT now(),
    last_seen_at    timestamptz NOT NULL DEFAULT now(),
    expires_at      timestamptz NOT NULL
);
CREATE INDEX sessions_account_id ON sessions (account_id, id);
CREATE INDEX sessions_expires_at ON sessions (expires_at);

-- Each refresh spends one token and issues the next; a spent one that comes again ends the session.
CREATE TABLE refresh_tokens (
    digest          bytea PRIMARY KEY,
    session_id      uuid NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    issued_at       timestamptz NOT NULL DEFAULT now(),
    spent_at        timestamptz
);
CREATE INDEX refresh_tokens_session_id ON refresh_tokens (session_id);
