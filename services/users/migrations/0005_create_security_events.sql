-- What happened to an account, for its owner to see. It goes with the account: nothing personal outlives it.
CREATE TABLE security_events (
    id              uuid PRIMARY KEY,
    account_id      uuid NOT NULL REFERENCES accounts (id) ON DELETE CASCADE,
    what            text NOT NULL,
    device          text NOT NULL,
    address         text NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX security_events_account_id ON security_events (account_id, id);
CREATE INDEX security_events_created_at ON security_events (created_at);
