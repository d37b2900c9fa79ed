-- The tokens of links that went out by email. Only hashes are stored, and using one deletes it.
CREATE TABLE one_time_tokens (
    digest          bytea PRIMARY KEY,
    account_id      uuid NOT NULL REFERENCES accounts (id) ON DELETE CASCADE,
    purpose         text NOT NULL CHECK (purpose IN ('verify_email', 'reset_password')),
    expires_at      timestamptz NOT NULL
);
CREATE INDEX one_time_tokens_account_id ON one_time_tokens (account_id, purpose);

-- Asked for by anybody, for any address; worked off at once, after the answer, so that its time tells nothing.
CREATE TABLE password_reset_requests (
    id              uuid PRIMARY KEY,
    email           text NOT NULL,
    device          text NOT NULL,
    address         text NOT NULL
);
