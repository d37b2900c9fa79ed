-- Ed25519 keys that sign access tokens. The private half is encrypted with a key from the environment.
CREATE TABLE signing_keys (
    id              text PRIMARY KEY,
    public_key      bytea NOT NULL,
    private_key     bytea NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT now()
);
